"""Is a change worth making? Budgets for failures, and growth weighed against what switching costs."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.history import History
from orchestrator.core.spec import FailureClass, JobSpec
from orchestrator.core.types import Plan

GROWTH_HORIZON_S = 1800.0
"""Time for which a gain is expected to last: published rates lose a node of a large job every few hours, so half an
hour is a cautious guess until the observed failure rate replaces it."""
DEFAULT_SWITCH_S = 30.0
"""Cost of a switch before one has been measured."""
PREFERENCE_FLOOR = 0.9
"""A preferred mesh size may cost this much of the speed."""
FRUITLESS_GENERATIONS = 3
"""Generations in a row without progress that end the job."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Yes or no, and why."""

    yes: bool
    reason: str


def switch_s(history: History) -> float:
    """Seconds that a switch costs: the median of the last recoveries, or a guess before the first."""
    seconds = sorted(sum(one.stages_s(0.0).values()) for one in history.incidents[-5:] if one.closed_s is not None)
    return seconds[len(seconds) // 2] if seconds else DEFAULT_SWITCH_S


def worth_switching(
    current: Plan, proposed: Plan, cost_s: float, spec: JobSpec, horizon_s: float = GROWTH_HORIZON_S
) -> Decision:
    """Is `proposed` faster by more than the switch costs within the horizon?

    Gain = horizon * (1 - 1 / speed-up); the speed-up is the ratio of the estimated step times, or of the device counts
    where a plan has no estimate. A size that the job file prefers is worth a loss of a tenth.
    """
    if current.step_s > 0 and proposed.step_s > 0:
        speed_up = current.step_s / proposed.step_s
    else:
        speed_up = proposed.mesh.world_size / current.mesh.world_size
    wished = sorted(_preferred(proposed, spec) - _preferred(current, spec))
    if wished and speed_up >= PREFERENCE_FLOOR:
        sizes = ", ".join(f"{axis} {spec.parallelism[axis].prefer}" for axis in wished)
        return Decision(True, f"the preferred {sizes} is possible again, at {speed_up:.2f}x the speed by estimate")
    gain_s = horizon_s * (1 - 1 / speed_up)
    numbers = f"{speed_up:.2f}x the speed for {horizon_s:.0f} s saves {gain_s:.0f} s, switching costs {cost_s:.0f} s"
    return Decision(gain_s > cost_s, numbers)


def _preferred(plan: Plan, spec: JobSpec) -> set[str]:
    """Axes that have the size which the job file prefers."""
    return {axis for axis, bounds in spec.parallelism.items() if getattr(plan.mesh, axis) == bounds.prefer}


def exhausted(history: History, now_s: float) -> str | None:
    """Why the job must not be restarted again, or None when it may be."""
    if not history.failures:
        return None
    last = history.failures[-1]
    if last.kind is FailureClass.USER and last.signature:
        same = sum(1 for one in history.failures if one.signature == last.signature)
        if same >= 2:
            return "the training script raised the same error at the same step twice"
    if history.fruitless >= FRUITLESS_GENERATIONS:
        return f"no progress in {history.fruitless} generations"
    budget = history.spec.recovery.budgets.get(last.kind)
    if budget is not None:
        recent = sum(1 for one in history.failures if one.kind is last.kind and now_s - one.time_s < budget.window_s)
        if recent > budget.failures:
            return f"{recent} {last.kind} failures within {budget.window_s:.0f} s, the budget is {budget.failures}"
    return None
