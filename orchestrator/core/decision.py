"""Wait, use a spare, shrink, grow or stay: what each is worth until the job will probably be interrupted again.

The unit is one second of training at the full speed in question. Whatever is chosen after a loss costs one recovery,
which is therefore left out; growing later, or now, costs another.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.types import Plan


@dataclass(frozen=True, slots=True)
class Option:
    """Something that can be done now."""

    name: str
    """`wait`, `use spare`, `shrink`, `grow` or `stay`."""
    useful_s: float
    """Expected seconds of training at full speed within the horizon."""
    how: str = ""
    """What it rests on, in words."""

    def __str__(self) -> str:
        return f"{self.name}{f' ({self.how})' if self.how else ''} {self.useful_s:.0f} s"


@dataclass(frozen=True, slots=True)
class Decision:
    """The option that is worth most, and what the others would have been worth."""

    chosen: Option
    others: tuple[Option, ...]
    horizon_s: float

    @property
    def reason(self) -> str:
        """The numbers in one clause."""
        against = f", against {', '.join(map(str, self.others))}" if self.others else ""
        return f"{self.chosen} of useful training in the next {self.horizon_s:.0f} s{against}"


def speed(plan: Plan, full: Plan) -> float:
    """Speed of `plan` relative to `full`: by estimated step times, or devices where a plan has no estimate."""
    if plan.step_s > 0 and full.step_s > 0:
        return full.step_s / plan.step_s
    return plan.mesh.world_size / full.mesh.world_size


def after_loss(before: Plan, left: Plan, *, wait_s: float | None, switch_s: float, horizon_s: float) -> Decision:
    """Wait for the lost nodes, or train on with the plan `left` and grow when they return?

    `wait_s` is the expected time until they are back (None: unknown), `switch_s` what growing costs then.
    """
    slow = min(1.0, speed(left, before))
    if wait_s is None or wait_s >= horizon_s:
        known = "no return is expected" if wait_s is None else f"a return takes {wait_s:.0f} s"
        return _best(
            [Option("shrink", slow * horizon_s, f"at {slow:.2f}x the speed"), Option("wait", 0, known)], horizon_s
        )
    after_s = horizon_s - wait_s
    grown_s = max(slow * after_s, after_s - switch_s)
    shrink = Option("shrink", slow * wait_s + grown_s, f"at {slow:.2f}x the speed, growing costs {switch_s:.0f} s")
    return _best([shrink, Option("wait", after_s, f"a return takes {wait_s:.0f} s")], horizon_s)


def on_joining(current: Plan, proposed: Plan, *, switch_s: float, horizon_s: float) -> Decision:
    """Change to `proposed` now, or stay as it is until the next interruption, when changing costs nothing more?"""
    slow = speed(current, proposed)
    grow = Option("grow", max(0.0, horizon_s - switch_s), f"switching costs {switch_s:.0f} s")
    return _best([Option("stay", slow * horizon_s, f"at {slow:.2f}x the speed"), grow], horizon_s)


def _best(options: list[Option], horizon_s: float) -> Decision:
    """The most useful; of equal ones the first, which is the one that needs less to come true."""
    chosen = max(options, key=lambda one: one.useful_s)
    return Decision(chosen, tuple(one for one in options if one is not chosen), horizon_s)
