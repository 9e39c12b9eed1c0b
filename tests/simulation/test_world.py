"""Lives that can be followed by hand, and what must hold of any."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core.status import Phase
from orchestrator.simulation import study as studies
from orchestrator.simulation.failures import FailureModel, Kind, Outage
from orchestrator.simulation.policies import POLICIES
from orchestrator.simulation.timing import Timing
from orchestrator.simulation.world import World
from tests.simulation.studies import DAY_S, SPEC, study, world

HOUR_S = 3600.0


def test_without_failures_only_the_start_and_saves_cost() -> None:
    account = world([]).run()
    assert account.interruptions == account.changes == 0
    lost = {name: seconds for name, seconds in account.seconds.items() if seconds > 0}
    assert set(lost) == {"useful", "checkpoint stall", "decision", "restart"}
    assert lost["restart"] == pytest.approx(Timing().restart_s(128))
    assert account.goodput > 0.99


def test_one_loss_followed_by_hand() -> None:
    """Lost at noon for good: the work of an interval, detection, planning, conversion, restart; then fifteen nodes."""
    lost = Outage(DAY_S / 2, 10 * DAY_S, (3,), Kind.NODE)
    one = world([lost])
    account = one.run()
    timing = Timing()
    assert account.interruptions == 1
    assert account.seconds["detection"] == pytest.approx(timing.detect_s)
    assert account.seconds["decision"] == pytest.approx(2 * timing.plan_s)
    assert account.seconds["conversion"] == pytest.approx(timing.convert_s)
    restarts = timing.restart_s(128), timing.restart_s(one.job.history.generation.plan.mesh.world_size)  # type: ignore[union-attr]
    assert account.seconds["restart"] == pytest.approx(sum(restarts))
    assert one.job.save_every is not None
    assert 0 < account.seconds["lost work"] <= one.job.save_every.seconds * 1.3 + timing.write_s + timing.stall_s
    (incident,) = one.job.history.incidents
    assert "node-3 lost" in incident.cause and incident.decision.startswith("shrink")
    assert "node-3" not in one.job.history.generation.assignment.names  # type: ignore[union-attr]
    step_s = one.job.history.generation.plan.step_s  # type: ignore[union-attr]
    speed = one._full_s / step_s
    after_s = DAY_S / 2 - sum((timing.detect_s, timing.plan_s, timing.convert_s, restarts[1]))
    assert account.seconds["degraded capacity"] == pytest.approx(after_s * (1 - speed), rel=0.02)
    assert account.total_s == pytest.approx(DAY_S)


def test_a_node_that_returns_is_taken_back_without_a_lost_step() -> None:
    one = world([Outage(6 * HOUR_S, 8 * HOUR_S, (5,), Kind.NODE)])
    account = one.run()
    assert [incident.cause.split()[0] for incident in one.job.history.incidents] == ["node-5", "capacity"]
    assert account.changes == 1 and len(one.job.history.generation.assignment.nodes) == 16  # type: ignore[union-attr]
    lost_work = world([Outage(6 * HOUR_S, 99 * HOUR_S, (5,), Kind.NODE)]).run().seconds["lost work"]
    assert account.seconds["lost work"] == pytest.approx(lost_work), "growing loses none"


def test_an_announced_loss_loses_no_step() -> None:
    account = world([Outage(6 * HOUR_S, 99 * HOUR_S, (5,), Kind.PREEMPTION, notice_s=300)]).run()
    assert account.interruptions == 0 and account.changes == 1
    assert account.seconds["lost work"] == account.seconds["detection"] == 0


def test_a_hang_is_found_later() -> None:
    quick = world([Outage(6 * HOUR_S, 6 * HOUR_S, (5,), Kind.PROCESS)]).run()
    slow = world([Outage(6 * HOUR_S, 6 * HOUR_S, (5,), Kind.PROCESS, silent=True)]).run()
    assert quick.seconds["detection"] == pytest.approx(Timing().detect_s)
    assert slow.seconds["detection"] == pytest.approx(Timing().hang_s)
    assert quick.interruptions == slow.interruptions == 1


def test_who_waits_waits_and_who_has_spares_does_not() -> None:
    outage = [Outage(6 * HOUR_S, 9 * HOUR_S, (0,), Kind.NODE)]
    waits, has_spares = world(outage, "wait").run(), world(outage, "spares").run()
    assert waits.seconds["waiting"] > 2.9 * HOUR_S
    assert has_spares.seconds["waiting"] < 120 and has_spares.seconds["idle spares"] > 0
    assert world(outage, "regrow").run().goodput > max(waits.goodput, has_spares.goodput)


def test_equal_shares_leave_nodes_idle() -> None:
    outage = [Outage(6 * HOUR_S, 99 * HOUR_S, (0,), Kind.NODE)]
    one = world(outage, "equal")
    account = one.run()
    generation = one.job.history.generation
    assert generation is not None and SPEC.global_batch % generation.plan.mesh.dp_degree == 0
    assert len(set(generation.plan.batch.samples)) == 1
    assert account.seconds["degraded capacity"] > world(outage, "regrow").run().seconds["degraded capacity"]


def test_a_rack_lost_while_the_job_restarts() -> None:
    first = 6 * HOUR_S
    outages = [
        Outage(first, first + HOUR_S, (1,), Kind.NODE),
        Outage(first + 60, first + 2 * HOUR_S, tuple(range(8, 16)), Kind.RACK),
    ]
    one = world(outages)
    account = one.run()
    assert one.job.phase is Phase.RUNNING and len(one.job.history.generation.assignment.nodes) == 16  # type: ignore[union-attr]
    assert account.total_s == pytest.approx(DAY_S)


def test_nobody_left_and_back() -> None:
    one = world([Outage(3 * HOUR_S, 4 * HOUR_S, tuple(range(16)), Kind.RACK)])
    account = one.run()
    assert one.job.phase is Phase.RUNNING
    assert account.seconds["waiting"] == pytest.approx(HOUR_S, rel=0.05)


def test_any_study_accounts_for_all_its_time_and_is_the_same_again() -> None:
    wanted = study(seeds=(1, 2))
    results = studies.run(wanted)
    for one in results:
        assert sum(one.shares.values()) == pytest.approx(1, abs=1e-9)
        assert all(share >= -1e-12 for share in one.shares.values())
        assert one.interruptions > 0 and one.phase == "RUNNING"
    assert studies.run(wanted, workers=2) == results
    assert len({one.goodput for one in results}) == len(results), "policies and seeds differ"
    best = studies.summarize(wanted, results)[0]
    assert best.policy.name == "regrow"


def test_the_published_run() -> None:
    """Llama 3 on 2,048 nodes: more than 90 % effective training time (arXiv:2407.21783, section 3.3.4).

    `baseline` stands for it, its unpublished interval chosen to fit; regrow has to be better. Eight of the 54
    days, for time: `make bench` has all, and all policies.
    """
    from orchestrator.simulation.failures import PRESETS
    from orchestrator.simulation.policies import POLICIES
    from tests.unit.planner.jobs import LLAMA_405B, job, nodes

    wanted = studies.Study(
        job(LLAMA_405B, global_batch=2048),
        tuple(nodes(2048, 8, "h100", first=0)),
        (POLICIES["regrow"], POLICIES["baseline"]),
        8.0,
        failures=PRESETS["llama3"],
    )
    regrow, baseline = studies.run(wanted, workers=2)
    assert baseline.ettr == pytest.approx(0.90, abs=0.03)
    assert regrow.goodput > baseline.goodput and regrow.ettr > baseline.ettr


def test_nodes_lie_in_the_racks_that_fail_and_the_planner_sees_them() -> None:
    model = FailureModel("tests", racks_per_1000_days=100, rack_nodes=4)
    lying = study(failures=model)
    assert [node.rack for node in lying.placed] == [f"rack-{number // 4}" for number in range(16)]
    assert {one.nodes for one in lying.outages(1)} <= {tuple(range(at, at + 4)) for at in range(0, 16, 4)}
    told = replace(lying, nodes=tuple(replace(node, rack="ab"[at % 2]) for at, node in enumerate(lying.nodes)))
    assert {one.nodes for one in told.outages(1)} == {tuple(range(0, 16, 2)), tuple(range(1, 16, 2))}
    assert study(failures=None, trace=((0.0, 16),)).placed == lying.nodes


def test_where_racks_matter_a_life_is_planned_on_the_nodes_that_are_left() -> None:
    lost = [Outage(6 * HOUR_S, 99 * HOUR_S, (one,), Kind.NODE) for one in range(2, 12)]
    nodes = study(failures=FailureModel(rack_nodes=8)).placed
    lives = {}
    for thinner in (1.0, 32.0):
        spec = replace(SPEC, rack_oversubscription=thinner)
        one = World(spec, nodes, lost, POLICIES["regrow"], Timing(), DAY_S)
        one.run()
        lives[thinner] = one.job.history.generation
    rack = {node.node: node.rack for node in nodes}
    for thinner, last in lives.items():
        assert last is not None and len(last.assignment.nodes) == 6, thinner
        left = last.assignment.names
        assert [rack[name] for name in left] == ["rack-0"] * 2 + ["rack-1"] * 4, thinner
        assert not {f"node-{one}" for one in range(2, 12)} & set(left), thinner


def test_where_racks_matter_a_study_is_of_nodes_in_racks() -> None:
    model = FailureModel("tests", per_1000_node_days=100, rack_nodes=4)
    told = study(job=replace(SPEC, rack_oversubscription=32.0), days=2.0, failures=model)
    lives = [
        World(told.job, nodes, told.outages(1), POLICIES["regrow"], told.timing, told.seconds)
        for nodes in (told.placed, told.nodes)
    ]
    placed, nowhere = (one.run().shares() for one in lives)
    assert studies.simulate(told, POLICIES["regrow"], 1).shares == placed != nowhere


def test_racks_that_do_not_matter_change_no_life() -> None:
    told = study(days=4.0, policies=(POLICIES["regrow"],))
    plain = World(told.job, told.nodes, told.outages(1), POLICIES["regrow"], told.timing, told.seconds)
    assert studies.simulate(told, POLICIES["regrow"], 1).shares == plain.run().shares()
