from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.reconcile import AskSave, CurrentLaunch, Start, Stop, TellEndpoint, reconcile
from orchestrator.core.types import Directive
from tests.unit.agents.orders import directive, order

RUNNING = CurrentLaunch(generation=3, ended=False, endpoint_known=True, save_request=0, pausing=False)
ENDED = replace(RUNNING, ended=True)


def test_idle_node_starts_what_is_ordered() -> None:
    wanted = order(3)
    assert reconcile(None, directive(3, wanted), "a", 3) == (Start(wanted),)


def test_nothing_ordered_and_nothing_runs() -> None:
    assert reconcile(None, directive(3), "a", 3) == ()
    assert reconcile(ENDED, directive(3), "a", 3) == ()


def test_running_launch_is_stopped_when_nothing_is_ordered() -> None:
    assert [type(action) for action in reconcile(RUNNING, directive(4), "a", 4)] == [Stop]


def test_replacement_stops_first_and_starts_after_the_end() -> None:
    wanted = order(4)
    assert [type(action) for action in reconcile(RUNNING, directive(4, wanted), "a", 4)] == [Stop]
    assert reconcile(ENDED, directive(4, wanted), "a", 4) == (Start(wanted),)


def test_ended_launch_is_never_started_again() -> None:
    assert reconcile(ENDED, directive(3, order(3)), "a", 3) == ()


@pytest.mark.parametrize("current", [None, RUNNING, ENDED])
def test_directive_of_an_older_generation_is_ignored(current: CurrentLaunch | None) -> None:
    assert reconcile(current, directive(2, order(2), pause=True), "a", 3) == ()
    assert reconcile(current, directive(2), "a", 3) == ()


def test_launch_of_another_generation_than_the_newest_is_not_run() -> None:
    assert reconcile(None, directive(4, order(3)), "a", 4) == ()
    assert [type(action) for action in reconcile(RUNNING, directive(4, order(3)), "a", 4)] == [Stop]


def test_node_without_a_part_runs_nothing() -> None:
    assert reconcile(None, directive(3, order(3)), "c", 3) == ()
    assert [type(action) for action in reconcile(RUNNING, directive(3, order(3)), "c", 3)] == [Stop]


def test_endpoint_is_told_once() -> None:
    waiting = replace(RUNNING, endpoint_known=False)
    told = directive(3, order(3, store="h:1"))
    assert reconcile(waiting, told, "b", 3) == (TellEndpoint("h:1"),)
    assert reconcile(RUNNING, told, "b", 3) == ()
    assert reconcile(waiting, directive(3, order(3)), "b", 3) == ()


def test_save_and_pause_are_asked_once() -> None:
    asked = directive(3, order(3), save_request=2)
    assert reconcile(RUNNING, asked, "a", 3) == (AskSave(2, False),)
    assert reconcile(replace(RUNNING, save_request=2), asked, "a", 3) == ()
    pause = directive(3, order(3), pause=True)
    assert reconcile(replace(RUNNING, save_request=2), pause, "a", 3) == (AskSave(2, True),)
    assert reconcile(replace(RUNNING, save_request=2, pausing=True), pause, "a", 3) == ()


def carry_out(current: CurrentLaunch | None, action: object) -> CurrentLaunch | None:
    match action:
        case Start(launch):
            return CurrentLaunch(launch.generation.number, False, False, 0, False)
        case Stop():
            assert current is not None
            return replace(current, ended=True)
        case TellEndpoint():
            assert current is not None
            return replace(current, endpoint_known=True)
        case AskSave(request, pause):
            assert current is not None
            return replace(current, save_request=request, pausing=pause)
    raise AssertionError(action)


launches = st.builds(
    CurrentLaunch,
    generation=st.integers(1, 5),
    ended=st.booleans(),
    endpoint_known=st.booleans(),
    save_request=st.integers(0, 3),
    pausing=st.booleans(),
)
directives = st.builds(
    directive,
    generation=st.integers(1, 5),
    launch=st.none() | st.builds(order, st.integers(1, 5), store=st.sampled_from([None, "h:1"])),
    save_request=st.integers(0, 3),
    pause=st.booleans(),
)


@settings(deadline=None)
@given(st.none() | launches, directives, st.sampled_from("abc"), st.integers(1, 5))
def test_carrying_out_what_is_decided_comes_to_rest_at_what_is_ordered(
    current: CurrentLaunch | None, ordered: Directive, node: str, newest: int
) -> None:
    newest = max(newest, ordered.generation, current.generation if current else 0)
    before = current
    for _ in range(5):
        actions = reconcile(current, ordered, node, newest)
        for action in actions:
            current = carry_out(current, action)
    assert reconcile(current, ordered, node, newest) == ()
    if ordered.generation < newest:
        assert current == before
        return
    wanted = ordered.launch
    may_run = wanted is not None and wanted.generation.number == newest and node in wanted.generation.assignment.names
    assert current is None or current.ended or (may_run and current.generation == newest)
    if may_run and (before is None or before.generation != newest):
        assert current is not None
        assert (current.generation, current.ended) == (newest, False)
