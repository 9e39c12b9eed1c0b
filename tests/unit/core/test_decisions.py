"""Verdicts, capacity, root causes, budgets and growth: pure functions, so a table of cases each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.capacity import Candidate, choose, hold_s, offer, settled
from orchestrator.core.decision import after_loss
from orchestrator.core.facts import GenerationEnded, GenerationStarted, JobAccepted
from orchestrator.core.failure import root_cause
from orchestrator.core.fleet import Node
from orchestrator.core.health import Signals, verdict
from orchestrator.core.history import History, replay
from orchestrator.core.job import Job
from orchestrator.core.policy import exhausted, growth
from orchestrator.core.rates import mtbf_s, remaining_s
from orchestrator.core.spec import AxisBounds, Budget, CheckpointSpec, FailureClass, JobSpec, RecoverySpec
from orchestrator.core.status import Health
from orchestrator.core.types import (
    AssignedNode,
    Assignment,
    BatchSplit,
    Entrypoint,
    Generation,
    LaunchReport,
    LaunchState,
    Mesh,
    NodeCapacity,
    NodeReport,
    Plan,
    WorkerError,
)

RECOVERY = RecoverySpec(heartbeat_s=1.0, lost_after_s=12.0, settle_s=2.0)


def spec(**changes: object) -> JobSpec:
    fields: dict[str, object] = {"min_nodes": 1, "max_nodes": 4, "recovery": RECOVERY} | changes
    return JobSpec("gpt", Entrypoint("train.py"), CheckpointSpec("file:///c"), 48, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        (Signals(True, 0.5, False), Health.HEALTHY),
        (Signals(True, 3.0, False), Health.SUSPECT),
        (Signals(True, 12.0, False), Health.LOST),
        (Signals(False, 0.1, False), Health.SUSPECT),
        (Signals(False, 0.1, True), Health.LOST),
        (Signals(True, 3.9, True), Health.SUSPECT),
        (Signals(True, 4.0, True), Health.LOST),
        (Signals(None, 3.0, True), Health.SUSPECT),
        (Signals(None, 4.0, True), Health.LOST),
        (Signals(False, 3.9, False, starting=True), Health.SUSPECT),
        (Signals(False, 4.0, False, starting=True), Health.LOST),
        (Signals(True, 0.0, False, lost_reason="given up"), Health.LOST),
    ],
)
def test_verdict(signals: Signals, expected: Health) -> None:
    judged = verdict(signals, RECOVERY)
    assert judged.health is expected
    assert judged.reason


def candidate(node: str, joined_s: float = 0.0, losses: tuple[float, ...] = (), *, warm: bool = True) -> Candidate:
    return Candidate(node, NodeCapacity(node, 2), joined_s, losses, warm)


def test_a_flapping_node_is_held_back_longer_each_time_and_forgiven_after_an_hour() -> None:
    times = [hold_s(candidate("a", losses=tuple([5.0] * n)), 2.0, 10.0) for n in range(6)]
    assert times == [0.0, 0.0, 4.0, 8.0, 16.0, 32.0]
    assert hold_s(candidate("a", losses=(5.0,) * 6), 2.0, 4000.0) == 0.0
    assert hold_s(candidate("a", losses=(5.0,) * 900), 2.0, 10.0) == 600.0


def test_growth_waits_for_the_settle_window_and_for_a_warm_node() -> None:
    assert not settled(candidate("a", joined_s=9.0), 2.0, 10.0)
    assert settled(candidate("a", joined_s=8.0), 2.0, 10.0)
    assert not settled(candidate("a", joined_s=8.0, warm=False), 2.0, 10.0)


def test_choose_keeps_known_nodes_and_takes_held_back_ones_only_in_need() -> None:
    names = [candidate("d"), candidate("c"), candidate("b"), candidate("a", 9.0, (1.0, 2.0))]
    assert [one.node for one in choose(names, spec(max_nodes=2), 10.0, keep=("d",))] == ["b", "d"]
    assert [one.node for one in choose(names, spec(), 10.0, keep=())] == ["b", "c", "d"]
    assert [one.node for one in choose(names, spec(min_nodes=4), 10.0, keep=())] == ["a", "b", "c", "d"]


def test_a_job_may_use_fewer_devices_than_a_node_has() -> None:
    report = NodeReport("a", "a#1", "", 2)
    assert offer(report, spec(devices_per_node=1)).devices == 1
    assert offer(report, spec()).devices == offer(report, spec(devices_per_node=4)).devices == 2


def failed(*errors: WorkerError) -> LaunchReport:
    return LaunchReport(1, LaunchState.FAILED, errors=errors)


def error(rank: int, exception: str, time_s: float, *, step: int = 7, collective: bool = False) -> WorkerError:
    trace = f'  File "train.py", line 3, in main\n{exception}: at 0x{rank}'
    return WorkerError(rank, exception, f"at 0x{rank}", trace, step, time_s, collective)


def test_the_earliest_error_that_is_no_echo_is_the_root_cause() -> None:
    said = [
        ("a", failed(error(0, "DistBackendError", 1.0, collective=True))),
        ("b", failed(error(2, "ValueError", 2.0), error(3, "KeyError", 3.0))),
        ("c", failed(error(4, "signal SIGABRT", 1.5))),
    ]
    cause = root_cause(said, {})
    assert (cause.kind, cause.node) == (FailureClass.USER, "b")
    assert "ValueError" in cause.text


def test_a_signal_is_transient_a_lost_node_is_hardware_and_an_echo_is_unknown() -> None:
    killed = [("a", failed(error(0, "signal SIGKILL", 1.0)))]
    echo = [("a", failed(error(0, "DistBackendError", 1.0, collective=True)))]
    assert root_cause(killed, {}).kind is FailureClass.TRANSIENT
    assert root_cause(echo, {}).kind is FailureClass.UNKNOWN
    assert root_cause(killed, {"b": "no heartbeat"}).kind is FailureClass.HARDWARE
    assert root_cause([], {}).kind is FailureClass.UNKNOWN


def test_the_signature_is_of_place_and_step_not_of_the_message() -> None:
    one = root_cause([("a", failed(error(0, "ValueError", 1.0)))], {}).signature
    other = root_cause([("b", failed(error(5, "ValueError", 9.0)))], {}).signature
    later = root_cause([("b", failed(error(5, "ValueError", 9.0, step=8)))], {}).signature
    assert one == other != later


def ended(time_s: float, kind: FailureClass, signature: str = "", step: int = 100) -> GenerationEnded:
    return GenerationEnded(time_s, 1, step, "cause", kind, signature)


def history(*ends: GenerationEnded, budgets: dict[FailureClass, Budget] | None = None) -> History:
    job = spec(recovery=RecoverySpec(budgets=budgets or {}))
    plan = Plan(Mesh(), BatchSplit(48, 48, 1, (48,)))
    facts: list[object] = [JobAccepted(0.0, job)]
    for number, end in enumerate(ends, 1):
        generation = Generation(number, plan, Assignment((AssignedNode("a", 0, 1),)))
        facts += [GenerationStarted(end.time_s, generation), end]
    return replay(facts)  # type: ignore[arg-type]


def test_the_same_error_twice_ends_the_job_without_touching_other_budgets() -> None:
    budgets = {FailureClass.USER: Budget(0, 10.0)}
    assert exhausted(history(ended(1.0, FailureClass.USER, "x")), 2.0) is None
    twice = history(ended(1.0, FailureClass.USER, "x", 5), ended(2.0, FailureClass.USER, "x", 6))
    assert "same error at the same step twice" in (exhausted(twice, 3.0) or "")
    other = history(ended(1.0, FailureClass.USER, "x", 5), ended(2.0, FailureClass.TRANSIENT, "", 6), budgets=budgets)
    assert exhausted(other, 3.0) is None


def test_a_budget_counts_its_class_within_its_window() -> None:
    budgets = {FailureClass.TRANSIENT: Budget(2, 10.0)}
    ends = [ended(float(t), FailureClass.TRANSIENT, step=t) for t in (1, 5, 9)]
    assert "budget is 2" in (exhausted(history(*ends, budgets=budgets), 9.0) or "")
    assert exhausted(history(*ends, budgets=budgets), 12.0) is None
    mixed = [*ends[:2], ended(9.0, FailureClass.HARDWARE)]
    assert exhausted(history(*mixed, budgets=budgets), 9.0) is None


def test_three_generations_that_end_before_a_step_end_the_job_but_lost_nodes_do_not() -> None:
    nothing = [ended(float(t), FailureClass.UNKNOWN, step=0) for t in range(3)]
    assert "no progress" in (exhausted(history(*nothing), 5.0) or "")
    lost = [ended(float(t), FailureClass.HARDWARE, step=0) for t in range(9)]
    assert exhausted(history(*lost), 9.0) is None


def plan(devices: int, step_s: float = 0.0) -> Plan:
    return Plan(Mesh(dp_shard=devices), BatchSplit(48, 48, 1, (48,)), step_s=step_s)


def growth_is(current: Plan, proposed: Plan, spec: JobSpec, cost_s: float) -> tuple[str, str]:
    decision = growth(current, proposed, spec, cost_s=cost_s, horizon_s=1800.0)
    return decision.chosen.name, decision.reason


def test_growth_is_weighed_against_its_cost() -> None:
    assert growth_is(plan(3), plan(4), spec(), 10.0) == (
        "grow",
        "grow (switching costs 10 s) 1790 s of useful training in the next 1800 s, against stay (at 0.75x the speed) "
        "1350 s",
    )
    assert growth_is(plan(3), plan(4), spec(), 460.0)[0] == "stay"
    assert growth_is(plan(3, 1.0), plan(4, 1.0), spec(), 0.0)[0] == "stay"


def test_a_preferred_size_is_worth_a_tenth_of_the_speed_and_no_more() -> None:
    wish = spec(parallelism={"dp_shard": AxisBounds(1, 8, prefer=4)})
    name, reason = growth_is(plan(3, 1.0), plan(4, 1.05), wish, 1.0)
    assert name == "grow"
    assert "preferred dp_shard 4 is possible again" in reason
    assert growth_is(plan(3, 1.0), plan(4, 1.2), wish, 1.0)[0] == "stay"
    assert growth_is(plan(4, 1.0), plan(4, 1.05), wish, 1.0)[0] == "stay"


def test_a_lost_node_is_waited_for_while_less_is_trained_without_it_than_growing_costs_later() -> None:
    def best(wait_s: float | None, switch_s: float, left: int = 3) -> str:
        decision = after_loss(plan(4), plan(left), wait_s=wait_s, switch_s=switch_s, horizon_s=3600.0)
        return decision.chosen.name

    assert best(10.0, 30.0) == "wait"  # 7.5 s of training at full speed, or a switch of 30 s
    assert best(39.0, 30.0) == "wait"
    assert best(41.0, 30.0) == "shrink"
    assert best(41.0, 30.0, left=1) == "wait"  # with a quarter of the speed waiting costs less
    assert best(None, 30.0) == "shrink"
    assert best(4000.0, 1e9) == "shrink"  # it will be interrupted before they are back


def test_after_a_loss_the_numbers_are_said() -> None:
    decision = after_loss(plan(4), plan(3), wait_s=100.0, switch_s=30.0, horizon_s=3600.0)
    assert decision.reason == (
        "shrink (at 0.75x the speed, growing costs 30 s) 3545 s of useful training in the next 3600 s, "
        "against wait (a return takes 100 s) 3500 s"
    )


def test_nodes_that_are_away_longer_than_ever_are_not_expected() -> None:
    assert remaining_s([10.0, 20.0, 60.0], 0.0) == 30.0
    assert remaining_s([10.0, 20.0, 60.0], 15.0) == (10.0 + 5.0 + 45.0) / 3
    assert remaining_s([10.0, 20.0, 60.0], 60.0) == 60.0
    assert remaining_s([10.0, 20.0, 60.0], 120.0) is None
    assert remaining_s([], 0.0) is None


def test_the_time_to_the_next_interruption_is_learnt() -> None:
    day_s = 86400.0
    fresh = history()
    assert mtbf_s(fresh, 4, 0.0) == day_s  # the published rate of four nodes is far above a day
    assert mtbf_s(fresh, 4096, 0.0) == pytest.approx(264 * day_s / 4096)
    assert mtbf_s(fresh, 4, 3 * day_s) == 7 * day_s
    many = history(*[ended(float(at), FailureClass.HARDWARE, step=at) for at in range(1, 101)])
    assert mtbf_s(many, 4, 100 * 1000.0) == pytest.approx(1000.0, rel=0.5)


@given(
    connected=st.sampled_from([None, True, False]),
    silence_s=st.floats(0, 40),
    lost=st.booleans(),
    peers_failed=st.booleans(),
    starting=st.booleans(),
    heartbeat_s=st.sampled_from([0.5, 1.0, 5.0]),
    lost_after_s=st.sampled_from([1.0, 10.0, 30.0]),
)
def test_what_is_healthy_at_a_glance_is_healthy(
    connected: bool | None,
    silence_s: float,
    lost: bool,
    peers_failed: bool,
    starting: bool,
    heartbeat_s: float,
    lost_after_s: float,
) -> None:
    recovery = RecoverySpec(heartbeat_s=heartbeat_s, lost_after_s=lost_after_s)
    job = Job(replay([JobAccepted(0.0, spec(recovery=recovery), 0)]), 0.0)
    node = Node("a", heard_s=0.0, joined_s=0.0, connected=connected)
    job.now_s = silence_s
    if lost:
        job.history.lost["a"] = "it was"
    signals = Signals(connected, silence_s, peers_failed, starting, "it was" if lost else None)
    if job._plainly_healthy(node):
        assert verdict(signals, recovery).health is Health.HEALTHY
    if silence_s == 0 and connected and not lost:
        assert job._plainly_healthy(node), "nearly all nodes must be"
