from __future__ import annotations

import pytest

from orchestrator.core.errors import InvalidInput
from orchestrator.core.status import Phase
from orchestrator.frontends.faults import Fault, Kind, Schedule, Trigger, parse

from .statuses import status

NODES = ["node-1", "node-2", "node-3", "node-4"]


def one(text: str) -> Fault:
    (fault,) = parse([text], [], NODES)
    return fault


@pytest.mark.parametrize(
    ("text", "kind", "nodes"),
    [
        ("node-2@step=40", Kind.NODE, ("node-2",)),
        ("node:node-2@step=40", Kind.NODE, ("node-2",)),
        ("node-2,node-3@step=40", Kind.NODE, ("node-2", "node-3")),
        (" node-2 , node-3@step=40 ", Kind.NODE, ("node-2", "node-3")),
        ("worker:node-1@step=40", Kind.WORKER, ("node-1",)),
        ("hang:node-1,node-4@step=40", Kind.HANG, ("node-1", "node-4")),
        ("agent:node-1@step=40", Kind.AGENT, ("node-1",)),
        ("controller@step=40", Kind.CONTROLLER, ()),
    ],
)
def test_what_happens_and_where(text: str, kind: Kind, nodes: tuple[str, ...]) -> None:
    assert one(text) == Fault(kind, nodes, Trigger(step=40), text)


@pytest.mark.parametrize(
    ("when", "trigger"),
    [
        ("step=1", Trigger(step=1)),
        ("t=12.5", Trigger(time_s=12.5)),
        ("t=0", Trigger(time_s=0.0)),
        ("t=3s", Trigger(time_s=3.0)),
        ("phase=STARTING", Trigger(phase=Phase.STARTING, entry=1)),
        ("phase=converting#3", Trigger(phase=Phase.CONVERTING, entry=3)),
    ],
)
def test_when(when: str, trigger: Trigger) -> None:
    assert one(f"controller@{when}").trigger == trigger


@pytest.mark.parametrize(
    ("fails", "returns", "words"),
    [
        (["node-2"], [], "cannot be read"),
        (["@step=3"], [], "cannot be read"),
        (["node-2@"], [], "cannot be read"),
        ([""], [], "cannot be read"),
        (["node-2@step=0"], [], "WHEN"),
        (["node-2@step=-1"], [], "WHEN"),
        (["node-2@step=1.5"], [], "WHEN"),
        (["node-2@step=²"], [], "WHEN"),
        (["node-2@t=nan"], [], "WHEN"),
        (["node-2@t=-1"], [], "WHEN"),
        (["node-2@phase=LUNCH"], [], "WHEN"),
        (["node-2@phase=STARTING#0"], [], "WHEN"),
        (["node-2@stop=3"], [], "WHEN"),
        (["node-9@step=3"], [], "the nodes are node-1, node-2, node-3, node-4"),
        (["node-2,node-9@step=3"], [], "'node-9'"),
        (["node-2,,node-3@step=3"], [], "names no node"),
        (["node-2,node-2@step=3"], [], "twice"),
        (["worker:@step=3"], [], "names no node"),
        (["wrkr:node-2@step=3"], [], "the kinds are node:, worker:, agent:, hang:, controller"),
        (["controller:node-1@step=3"], [], "unknown kind 'controller'"),
        ([], ["node-2@step=80"], "never lost"),
        (["node-1@step=40"], ["node-2@step=80"], "never lost"),
        (["worker:node-2@step=40"], ["node-2@step=80"], "never lost"),
        (["node-2@step=40"], ["node-2@step=80", "node-2@step=90"], "lost only 1 times"),
        (["node-2@step=40"], ["node-2@step=40"], "before it is lost"),
        (["node-2@t=40"], ["node-2@t=30"], "before it is lost"),
        (["node-2@step=40", "node-2@step=50"], [], "is lost already"),
        (["node-2@step=40"], ["worker:node-2@step=50"], "'worker:node-2', but the nodes are"),
    ],
)
def test_what_cannot_happen_is_refused(fails: list[str], returns: list[str], words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse(fails, returns, NODES)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_node_may_come_and_go() -> None:
    fails, returns = ["node-2@step=10", "node-2@step=30"], ["node-2@step=20", "node-2@step=40"]
    assert [fault.kind for fault in parse(fails, returns, NODES)] == [Kind.NODE, Kind.NODE, Kind.RETURN, Kind.RETURN]


def test_triggers_that_cannot_be_compared_are_left_to_the_run() -> None:
    assert len(parse(["node-2@step=40"], ["node-2@t=5"], NODES)) == 2


def texts(schedule: Schedule, *args: object) -> list[str]:
    return [fault.text for fault in schedule.due(*args)]  # type: ignore[arg-type]


def test_due_at_a_step_or_a_time_until_done() -> None:
    schedule = Schedule(parse(["node-2@step=40", "controller@t=5"], [], NODES))
    assert texts(schedule, None, 4.9) == []
    assert texts(schedule, status(step=39), 4.9) == []
    assert texts(schedule, status(step=41), 5.0) == ["node-2@step=40", "controller@t=5"]
    schedule.done(schedule.pending[0])
    assert texts(schedule, status(step=41), 5.0) == ["controller@t=5"]


def test_entries_into_a_phase_are_counted() -> None:
    schedule = Schedule(parse(["controller@phase=STARTING#3", "node-1@phase=STARTING"], [], NODES))
    schedule.observe(status(Phase.WAITING))
    assert texts(schedule, None, 0) == []
    for _ in range(3):  # the same generation, seen three times
        schedule.observe(status(Phase.STARTING, generation=1))
    assert texts(schedule, None, 0) == ["node-1@phase=STARTING"]
    schedule.observe(status(Phase.RUNNING, generation=1))
    schedule.observe(status(Phase.STARTING, generation=2))
    assert texts(schedule, None, 0) == ["node-1@phase=STARTING"]
    schedule.observe(status(Phase.STARTING, generation=3))  # what lay between was too short to be seen
    assert texts(schedule, None, 0) == ["controller@phase=STARTING#3", "node-1@phase=STARTING"]
