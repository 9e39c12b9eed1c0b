"""What the steps of a job teach is kept in a file and taken up by the next."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from orchestrator.controller.effects import Effects
from orchestrator.core.commands import MakePlan
from orchestrator.core.decision import after_loss, estimated
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
    corrected = planned(Effects(SPEC, kept=kept), step)
    assert Calibration.from_data(json.loads(kept.read_text())).seen
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]
    assert planned(Effects(SPEC, kept=kept)).plan == corrected.plan
    assert corrected.plan.step_s > 1.5 * first.plan.step_s


def test_a_file_that_cannot_be_read_or_written_only_costs_what_was_learnt(tmp_path: Path) -> None:
    kept = tmp_path / "calibration.json"
    kept.write_text("no")
    first = planned(Effects(SPEC, kept=kept))
    step = MeasuredPlan(first.plan, first.assignment, "h100", 2 * first.plan.step_s)
    assert planned(Effects(SPEC, kept=tmp_path / "no" / "such" / "file"), step).plan.step_s > first.plan.step_s


def test_old_and_new_plans_are_compared_by_what_is_known_now() -> None:
    """A device that is four times as slow as thought: the plan for three of four nodes is a fourth slower, no more."""
    effects = Effects(SPEC)
    first = planned(effects)
    step = MeasuredPlan(first.plan, first.assignment, "h100", 4 * first.plan.step_s)
    command = MakePlan(2, NODES[:3], first.plan, first.assignment, (step,))
    after = asyncio.run(effects.run(command))
    assert isinstance(after, PlanMade)
    assert after.previous_step_s > 2 * first.plan.step_s
    assert 0.5 < after.previous_step_s / after.plan.step_s <= 1.01
    decision = after_loss(
        estimated(first.plan, after.previous_step_s), after.plan, wait_s=None, switch_s=30, horizon_s=3600
    )
    assert decision.chosen.name == "shrink" and decision.chosen.useful_s > 1800
    assert estimated(first.plan, 0.0) is first.plan
