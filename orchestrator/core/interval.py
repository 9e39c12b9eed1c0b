"""How often to save: Daly's interval (J. T. Daly, FGCS 22, 2006, eq. 37), the higher-order form of Young's (1974).

A save that is written beside training costs the time for which training stands still (`stall_s`); what is lost at a
failure is half an interval, and what was being written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from orchestrator.core.spec import AutoInterval
from orchestrator.core.types import SaveReport

FIRST_S = 30.0
"""Interval until the first save has shown what saving costs."""
CHANGE = 1.2
"""An interval within this factor of the one in force is not worth telling the nodes."""


REMEMBERED = 9
"""Saves that the median of their costs is taken over."""


def cost(parts: Iterable[SaveReport]) -> tuple[float, float]:
    """(Stall, write) seconds of one save: those of the slowest rank."""
    listed = list(parts)
    return max(one.stall_s for one in listed), max(one.write_s for one in listed)


def typical(costs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Medians of the stalls and of the writes."""
    return median(stall_s for stall_s, _ in costs), median(write_s for _, write_s in costs)


@dataclass(frozen=True, slots=True)
class Tier:
    """One place that saves go to: what a save there costs, and how often it is needed."""

    stall_s: float
    write_s: float
    """Until the save can be restored from; training goes on meanwhile."""
    mtbf_s: float
    """Mean time between the failures that only this tier (or one behind it) recovers from."""


@dataclass(frozen=True, slots=True)
class SaveEvery:
    """An interval with what it is expected to lose."""

    seconds: float
    loss: float
    """Share of the time: stalls, and work repeated after failures."""
    reason: str


def young_s(stall_s: float, mtbf_s: float) -> float:
    """Seconds of training between saves to first order."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly_s(stall_s: float, mtbf_s: float) -> float:
    """Seconds of training between saves; `mtbf_s` where saving takes longer than twice that."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    part = stall_s / (2 * mtbf_s)
    return young_s(stall_s, mtbf_s) * (1 + math.sqrt(part) / 3 + part / 9) - stall_s


def expected_loss(every_s: float, tier: Tier) -> float:
    """Share of the time that saves every `every_s` seconds of training lose, to first order in 1 / MTBF."""
    return min(1.0, tier.stall_s / (every_s + tier.stall_s) + (every_s / 2 + tier.write_s) / tier.mtbf_s)


def save_every(tier: Tier, least_s: float, most_s: float, compared_s: float = FIRST_S) -> SaveEvery:
    """The interval of one tier within the user's bounds, never below the time that writing takes."""
    best_s = daly_s(tier.stall_s, tier.mtbf_s)
    floor_s = max(least_s, tier.write_s)
    seconds = min(max(best_s, floor_s), max(most_s, floor_s))
    loss = expected_loss(seconds, tier)
    bound = "" if seconds == best_s else f", bounded from {best_s:.3g} s"
    fixed = f"every {compared_s:g} s would lose {expected_loss(compared_s, tier):.2%}"
    reason = (
        f"every {seconds:.3g} s{bound}: a save stalls training for {tier.stall_s:.3g} s and takes "
        f"{tier.write_s:.3g} s, a failure is expected every {tier.mtbf_s:.3g} s; expected loss {loss:.2%}, {fixed}"
    )
    return SaveEvery(seconds, loss, reason)


def first(auto: AutoInterval) -> SaveEvery:
    """The interval until a save has been measured."""
    seconds = min(max(FIRST_S, auto.least_s), auto.most_s)
    return SaveEvery(seconds, 0.0, f"every {seconds:.3g} s, until the first save has shown what saving costs")


def save_tiers(tiers: Sequence[Tier], least_s: float, most_s: float) -> list[SaveEvery]:
    """The interval of each tier, nearest first: a tier is written at least as often as the ones behind it."""
    found: list[SaveEvery] = []
    for tier in reversed(tiers):
        most = min(most_s, found[-1].seconds) if found else most_s
        found.append(save_every(tier, least_s, most))
    return found[::-1]
