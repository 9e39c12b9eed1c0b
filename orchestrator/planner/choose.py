"""Which of the plans is taken.

In this order: preferences of the job file, as far as they idle at most a tenth of the devices that could be used; the
previous mesh, while nothing is more than 5 % faster (changing it costs a conversion, and the estimate is no better
than that); the fastest, and among those no slower the one on fewest devices: the others are then spares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import Mesh
from orchestrator.planner.calibration import Calibration
from orchestrator.planner.frontier import CLOSE, Ranking, Wish, axes_used, fastest, fitting, most_devices, ordered
from orchestrator.planner.judge import Judge
from orchestrator.planner.space import Rows, Space, length, only, take

SAME = 1.001
"""Step times within this factor count as equal."""
_BUSY = 0.9


@dataclass(frozen=True, slots=True)
class Search:
    """The spaces of a job, one for each pool, with their judges."""

    spec: JobSpec
    spaces: Sequence[Space]
    judges: Sequence[Judge]
    calibration: Calibration | None = None

    def ranked(self, wish: Wish, known: Ranking | None = None) -> Ranking:
        """The plans that may be chosen or listed, those `known` included."""
        found = Ranking(known.rows, known.step, limit=known.limit) if known else Ranking()
        for space, judge in reversed(list(zip(self.spaces, self.judges, strict=True))):  # the smallest sets a limit
            fastest(space, judge, wish, found)
        return found

    def most_devices(self, wish: Wish) -> int:
        """Devices of the largest plan that counts."""
        return max((most_devices(*one, wish) for one in zip(self.spaces, self.judges, strict=True)), default=0)

    def of(self, mesh: Mesh, wish: Wish) -> tuple[Rows, float] | None:
        """The fastest plan of one mesh that counts, and its seconds."""
        found = Ranking()
        for space, judge in zip(self.spaces, self.judges, strict=True):
            rows = wish.among(only(space, mesh))
            if length(rows):
                found.add(*fitting(rows, judge))
        return _best(found.rows, found.step) if len(found) else None


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan taken; `relaxed` says in words which preferences were not met, `kept` that the mesh stays."""

    row: Rows
    relaxed: tuple[str, ...]
    kept: bool
    ground: str
    """What speaks for it against a faster one: `preferred over` or `on fewer devices than`."""


def preferences(spec: JobSpec) -> tuple[tuple[str, int], ...]:
    """Preferred sizes by axis."""
    return tuple((axis, bounds.prefer) for axis, bounds in spec.parallelism.items() if bounds.prefer is not None)


def choose(search: Search, ranking: Ranking, previous: Mesh | None) -> Choice:
    """One of the plans; `ranking` holds those that may be the fastest, not empty."""
    wished = preferences(search.spec)
    most = search.most_devices(Wish()) if wished else 0
    wish, wanted = Wish(), ranking
    for met in range(len(wished), 0, -1):
        narrow = Wish(wished, met, int(np.ceil(most * _BUSY)))
        found = search.ranked(narrow)
        if len(found):
            wish, wanted = narrow, found
            break
    row, step = _best(wanted.rows, wanted.step)
    kept = search.of(previous, wish) if previous else None
    if kept is not None and kept[1] <= step * CLOSE:
        row = kept[0]
    relaxed = _relaxed(search, row, wished, most)
    ground = "preferred over" if wish.met else "on fewer devices than"
    return Choice(row, relaxed, kept is not None and row is kept[0], ground)


def _best(rows: Rows, step: np.ndarray) -> tuple[Rows, float]:
    """The plan on fewest devices among the fastest, and its seconds."""
    equal = step <= step.min() * SAME
    rows, step = take(rows, equal), step[equal]
    devices = rows["pp"] * rows["dp_replicate"] * rows["dp_shard"] * rows["cp"] * rows["tp"]
    at = int(ordered(rows, devices, axes_used(rows), step)[0])
    return take(rows, slice(at, at + 1)), float(step[at])


def _relaxed(search: Search, row: Rows, wished: tuple[tuple[str, int], ...], most: int) -> tuple[str, ...]:
    """Why each preference that the plan does not meet was relaxed."""
    reasons = []
    for axis, size in wished:
        if int(row[axis][0]) == size:
            continue
        possible = search.most_devices(Wish(((axis, size),), 1))
        name = f"preferred {axis} {size}"
        if not possible:
            reasons.append(f"{name} is not possible on {most} device{'' if most == 1 else 's'}")
        elif possible < most:
            reasons.append(f"{name} would leave {most - possible} of {most} devices idle")
        else:
            reasons.append(f"{name} does not go together with the other preferences")
    return tuple(reasons)
