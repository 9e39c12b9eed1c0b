"""Calibration: what measured steps of a job change in later estimates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core.errors import InvalidInput
from orchestrator.core.types import MeasuredPlan
from orchestrator.planner import Calibration, Planned, learn, plan
from tests.unit.planner.jobs import LLAMA_8B, job, nodes

SPEC, NODES = job(LLAMA_8B, global_batch=64), nodes(4, 8, "h100")


def planned(learnt: Calibration | None = None) -> Planned:
    found = plan(SPEC, NODES, calibration=learnt)
    assert isinstance(found, Planned)
    return found


def measured(found: Planned, times: float) -> MeasuredPlan:
    return MeasuredPlan(found.plan, found.assignment, "h100", times * found.plan.step_s)


def test_a_measured_plan_is_estimated_as_it_was_measured_and_the_others_alike() -> None:
    first = planned()
    learnt = learn(SPEC, [measured(first, 1.5)], Calibration())
    tp, size = first.plan.mesh.tp, first.plan.batch.micro_batch
    assert learnt.factor("h100", tp, size) == pytest.approx(1.5)
    assert learnt.factor("h100", 99, 99) == pytest.approx(1.5)
    assert learnt.factor("a100", tp, size) == 1
    again = planned(learnt)
    assert again.plan.mesh == first.plan.mesh
    assert first.plan.step_s < again.plan.step_s <= 1.5 * first.plan.step_s * 1.001


def test_a_size_that_turned_out_slow_is_avoided() -> None:
    first = planned()
    tp, size = first.plan.mesh.tp, first.plan.batch.micro_batch
    learnt = Calibration().observe("h100", tp + 1, size, 1.0, 1.0)
    for _ in range(10):
        learnt = learnt.observe("h100", tp + 1, size, 1.0, 1.0).observe("h100", tp, size, 3.0, 1.0)
    assert learnt.factor("h100", tp, size) > 2 * learnt.factor("h100", tp + 1, size)
    other = planned(learnt).plan
    assert (other.mesh.tp, other.batch.micro_batch) != (tp, size)


def test_what_is_not_believed_or_not_described_teaches_nothing() -> None:
    first = planned()
    assert learn(SPEC, [measured(first, 100)], Calibration()) == Calibration()
    assert learn(replace(SPEC, model=None), [measured(first, 1.5)], Calibration()) == Calibration()


def test_a_calibration_is_the_same_after_being_written_and_read() -> None:
    learnt = learn(SPEC, [measured(planned(), 1.5)], Calibration())
    assert Calibration.from_data(learnt.to_data()) == learnt
    for wrong in (None, {}, {"calibration": 2, "factors": []}, {"calibration": 1, "factors": [["h100", 1, 1, 0, 0]]}):
        with pytest.raises(InvalidInput, match="not a calibration"):
            Calibration.from_data(wrong)


def test_a_throttled_node_is_not_taken_for_a_slow_kind() -> None:
    capacity = [replace(NODES[0], speed=0.5), *NODES[1:]]
    spec = job(LLAMA_8B, global_batch=64, micro_batch=1, min_nodes=4, pp=1, tp=8)  # nothing to share: it slows down all
    found = plan(spec, capacity)
    assert isinstance(found, Planned) and len(found.assignment.names) == 4
    where = {node.node: node for node in capacity}
    tp, size = found.plan.mesh.tp, found.plan.batch.micro_batch
    told = learn(spec, [measured(found, 1.0)], Calibration(), where)
    assert told.factor("h100", tp, size) == pytest.approx(1.0, rel=0.05)
    assert learn(spec, [measured(found, 1.0)], Calibration()).factor("h100", tp, size) > 1.5
