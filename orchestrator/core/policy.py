"""What a switch costs, whether to grow, and when to give up."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.core.decision import Decision, on_joining, speed
from orchestrator.core.history import History
from orchestrator.core.spec import FailureClass, JobSpec
from orchestrator.core.types import Plan

DEFAULT_SWITCH_S = 30.0
"""Cost of a switch before one has been measured."""
PREFERENCE_FLOOR = 0.9
"""A preferred mesh size may cost this much of the speed."""
FRUITLESS_GENERATIONS = 3
"""Generations in a row without progress that end the job."""


def switch_s(history: History) -> float:
    """Seconds that a switch costs: the median of the last recoveries, or a guess before the first."""
    seconds = sorted(sum(one.stages_s(0.0).values()) for one in history.incidents[-5:] if one.closed_s is not None)
    return seconds[len(seconds) // 2] if seconds else DEFAULT_SWITCH_S


def growth(current: Plan, proposed: Plan, spec: JobSpec, *, cost_s: float, horizon_s: float) -> Decision:
    """Grow or stay? A size that the job file prefers is worth a loss of a tenth of the speed."""
    weighed = on_joining(current, proposed, switch_s=cost_s, horizon_s=horizon_s)
    wished = sorted(_preferred(proposed, spec) - _preferred(current, spec))
    faster = speed(proposed, current)
    if weighed.chosen.name == "grow" or not wished or faster < PREFERENCE_FLOOR:
        return weighed
    sizes = ", ".join(f"{axis} {spec.parallelism[axis].prefer}" for axis in wished)
    grow, stay = weighed.others[0], weighed.chosen
    return Decision(replace(grow, how=f"{grow.how}; the preferred {sizes} is possible again"), (stay,), horizon_s)


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
