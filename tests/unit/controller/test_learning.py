"""What the steps of a job teach is kept in a file and taken up by the next."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.controller.effects import Effects
from orchestrator.core.commands import MakePlan
from orchestrator.core.events import PlanMade
from orchestrator.core.types import MeasuredPlan
from orchestrator.planner import Calibration
from tests.unit.planner.jobs import LLAMA_8B, job, nodes

SPEC, NODES = job(LLAMA_8B, global_batch=64), tuple(nodes(4, 8, "h100"))


def planned(effects: Effects, *measured: MeasuredPlan) -> PlanMade:
    event = asyncio.run(effects.run(MakePlan(1, NODES, None, None, measured)))
    assert isinstance(event, PlanMade)
    return event


def test_the_next_job_plans_with_what_the_last_one_measured(tmp_path: Path) -> None:
    kept = tmp_path / "calibration.json"
    first = planned(Effects(SPEC, kept=kept))
    assert not kept.exists()
    step = MeasuredPlan(first.plan, first.assignment, "h100", 2 * first.plan.step_s)
    same_job = Effects(SPEC, kept=kept)
    assert planned(same_job, step).plan == first.plan, "estimates of one job can be compared with each other"
    assert Calibration.from_data(json.loads(kept.read_text())).seen
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]
    assert planned(same_job, step).plan == first.plan
    assert planned(Effects(SPEC, kept=kept)).plan.step_s > 1.5 * first.plan.step_s


def test_a_throttled_node_does_not_make_its_kind_slow(tmp_path: Path) -> None:
    """Nothing can be shared: the slow node slows down all, and the step was measured as it was expected."""
    spec = job(LLAMA_8B, global_batch=64, micro_batch=1, min_nodes=4, pp=1, tp=8)
    throttled = (replace(NODES[0], speed=0.5), *NODES[1:])
    effects = Effects(spec, kept=tmp_path / "calibration.json")
    first = asyncio.run(effects.run(MakePlan(1, throttled, None, None, ())))
    assert isinstance(first, PlanMade)
    step = MeasuredPlan(first.plan, first.assignment, "h100", first.plan.step_s)
    asyncio.run(effects.run(MakePlan(2, throttled, None, None, (step,))))
    learnt = Calibration.from_data(json.loads((tmp_path / "calibration.json").read_text()))
    assert learnt.factor("h100", 8, 1) == pytest.approx(1.0, rel=0.01)


def test_a_file_that_cannot_be_read_or_written_only_costs_what_was_learnt(tmp_path: Path) -> None:
    kept = tmp_path / "calibration.json"
    kept.write_text("no")
    first = planned(Effects(SPEC, kept=kept))
    step = MeasuredPlan(first.plan, first.assignment, "h100", 2 * first.plan.step_s)
    assert planned(Effects(SPEC, kept=tmp_path / "no" / "such" / "file"), step).plan == first.plan
