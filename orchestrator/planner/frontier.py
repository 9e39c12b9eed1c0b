"""The fastest plans of a space: all are weighed where there are few, else the most promising first.

A plan's time without data-parallel communication and optimizer does not depend on how its replicas are divided over
dp_replicate and dp_shard, and its memory is least where dp_shard takes them all. Rows that are bounded so are completed
in the order of their bound until it exceeds what is already found, so that nothing is lost that could still be chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

import numpy as np
from numpy.typing import NDArray

from orchestrator.planner.candidates import RECOMPUTATIONS, Candidates, Floats, Ints
from orchestrator.planner.judge import Judge
from orchestrator.planner.space import Rows, Space, candidates, joined, length, take

ALL_AT_ONCE = 20_000
"""Spaces of at most so many plans are weighed whole."""
CHUNK = 10_000
"""Plans completed at a time."""
LISTED = 10
"""Other meshes that are ranked beside the best."""
CLOSE = 1.05
"""Plans within this factor of the fastest are all kept, so that a mesh that runs may stay."""
_HOPELESS = 2.0
"""A plan is left out unseen when its work, done this many times as efficiently as any seen, would still be too slow."""
_WINDOWS = (0.98, 0.9, 0.5, 0.0)
"""Shares of the devices in which the largest plan is looked for one after the other."""
_AT_A_TIME = 256
KEY = ("pp", "dp_replicate", "cp", "tp", "ep")
"""Plans that differ in none of these are listed once: the best of them."""


@dataclass(frozen=True, slots=True)
class Wish:
    """Which plans count: on at least `devices` devices, with at least `met` of the preferred sizes by axis."""

    preferred: tuple[tuple[str, int], ...] = ()
    met: int = 0
    devices: int = 0

    def honoured(self, rows: Rows) -> Ints:
        """How many preferences each row meets; axes not chosen yet count as met."""
        counts = np.zeros(length(rows), np.int64)
        for axis, size in self.preferred:
            counts += rows[axis] == size if axis in rows else 1
        return counts

    def among(self, rows: Rows) -> Rows:
        """The rows that count, or may when they are complete."""
        if self.met == 0 and self.devices == 0:
            return rows
        replicas = rows["dp_replicate"] * rows["dp_shard"] if "dp_shard" in rows else rows["most"]
        enough = replicas * rows["pp"] * rows["cp"] * rows["tp"] >= self.devices
        return take(rows, enough & (self.honoured(rows) >= self.met))


@dataclass(slots=True)
class Ranking:
    """Plans that fit and are not known to be too slow, in no order."""

    rows: Rows = field(default_factory=dict)
    step: Floats = field(default_factory=lambda: np.zeros(0))
    weighed: int = 0
    """Plans that were taken in, those dropped included."""
    limit: float = inf
    """Seconds beyond which a plan is neither chosen nor listed."""

    def __len__(self) -> int:
        return len(self.step)

    def add(self, rows: Rows, step: Floats) -> None:
        """Take in plans; those beyond the limit are dropped."""
        self.weighed += len(step)
        close = step <= self.limit
        rows, step = take(rows, close), step[close]
        self.rows = joined([self.rows, rows]) if self.rows else rows
        self.step = np.concatenate([self.step, step])
        self.limit = self._limit()
        close = self.step <= self.limit
        self.rows, self.step = take(self.rows, close), self.step[close]

    def _limit(self) -> float:
        meshes = self._meshes()
        order = np.lexsort([self.step, meshes])
        begins = np.flatnonzero(np.append(True, meshes[order][1:] != meshes[order][:-1])[: len(order)])
        firsts = np.sort(self.step[order][begins])
        return inf if len(firsts) <= LISTED else float(max(firsts[LISTED], firsts[0] * CLOSE))

    def _meshes(self) -> Ints:
        """A number for each plan; plans that are listed once have the same (see `KEY`)."""
        key = np.zeros(len(self), np.int64)
        for name in KEY:
            key = key * (int(self.rows[name].max(initial=0)) + 1) + self.rows[name]
        return key

    def firsts(self) -> Ints:
        """Positions of the fastest plan of each mesh (see `KEY`), in no order."""
        order = self.order()
        _, first = np.unique(self._meshes()[order], return_index=True)
        return order[first]

    def order(self) -> Ints:
        """Positions from fast to slow; equal ones by devices and axes, then by whatever tells them apart."""
        return ordered(self.rows, self.step) if len(self) else np.zeros(0, np.int64)


def axes_used(rows: Rows) -> Ints:
    """On how many axes each mesh is larger than 1."""
    return np.asarray(np.stack([rows[name] > 1 for name in (*KEY, "dp_shard")]).sum(axis=0))


def ordered(rows: Rows, *first: Floats | Ints) -> Ints:
    """Positions by the keys `first`, then by few devices and axes, then by every choice."""
    plans = candidates(rows)
    axes = axes_used(rows)
    tail = ("recomputation", "pp", "cp", "tp", "ep", "interleave", "dp_replicate", "zero", "micro_batches")
    split = ("layers_last", "layers_first", "layers_middle")
    keys = [*first, plans.devices, axes, *(rows[name] for name in (*tail, *split))]
    return np.lexsort(keys[::-1])


def fitting(rows: Rows, judge: Judge) -> tuple[Rows, Floats]:
    """The complete rows that fit into memory, and their seconds."""
    if judge.limit_bytes != inf:
        rows = take(rows, judge.memory(candidates(rows)) <= judge.limit_bytes)
    return rows, judge.seconds(candidates(rows))


def fastest(space: Space, judge: Judge, wish: Wish, found: Ranking, at_once: int | None = None) -> None:
    """Add to `found` the plans of `space` that may be chosen or listed."""
    shapes = wish.among(space.shapes())
    shapes["least"] = np.maximum(shapes["least"], -(-wish.devices // (shapes["pp"] * shapes["cp"] * shapes["tp"])))
    loads = space.loads(shapes)
    if not length(loads):
        return
    if space.most_plans(loads) <= (ALL_AT_ONCE if at_once is None else at_once):
        found.add(*fitting(wish.among(space.complete(loads)), judge))
        return
    loads = space.loads(_possible(space, judge, shapes))
    efficiency = _begin(space, judge, wish, found, loads)
    rows = space.micro_batches(take(loads, space.work(loads) * efficiency <= found.limit * _HOPELESS))
    rows = take(rows, _promising(space.least_splits(rows), judge, found, known=False))
    rows = space.splits(rows)
    rows = space.recomputations(take(rows, _promising(rows, judge, found)))
    rows = take(rows, judge.least_memory(_most_sharded(space, rows)) <= judge.limit_bytes)
    bound = judge.at_least(*_unsharded(rows))
    order = np.argsort(bound, kind="stable")
    rows, bound = take(rows, order), bound[order]
    for part in _parts(space.divisions(rows), CHUNK):
        if bound[part.start] > found.limit:
            break
        _add(wish.among(space.replicas(take(rows, part))), judge, found)


def _add(rows: Rows, judge: Judge, found: Ranking) -> None:
    """Take in those that fit; of many only few are fast enough, so that memory is looked at last."""
    step = judge.seconds(candidates(rows))
    close = step <= found.limit
    rows, step = take(rows, close), step[close]
    found.weighed += int(len(close) - len(step))
    if judge.limit_bytes != inf:
        fits = judge.memory(candidates(rows)) <= judge.limit_bytes
        rows, step = take(rows, fits), step[fits]
    found.add(rows, step)


def _possible(space: Space, judge: Judge, shapes: Rows) -> Rows:
    """The shapes of which a plan fits into memory: on all devices, in the smallest micro-batches, all recomputed."""
    if judge.limit_bytes == inf:
        return shapes
    rows = space.smallest(space.micro_batches(space.largest(space.loads(shapes))))
    rows |= {"recomputation": np.full(length(rows), len(RECOMPUTATIONS) - 1)}
    fits = np.ones(length(shapes), bool)  # of some, only fewer replicas give as many micro-batches as chunks need
    fits[np.searchsorted(shapes["shape"], rows["shape"])] = False
    for split in (space.even_splits, space.splits):
        some = split(take(rows, ~fits[np.searchsorted(shapes["shape"], rows["shape"])]))
        least = judge.least_memory(_most_sharded(space, some))
        fits[np.searchsorted(shapes["shape"], some["shape"][least <= judge.limit_bytes])] = True
    return take(shapes, fits)


def _begin(space: Space, judge: Judge, wish: Wish, found: Ranking, loads: Rows) -> float:
    """Try each shape on as many devices as it can use; the fewest seconds of any per unit of `Space.work`."""
    rows = space.replicas(space.largest(loads))
    _, first = np.unique(rows["shape"], return_index=True)  # the one with the most shards
    rows = space.recomputations(space.even_splits(space.micro_batches(take(rows, first))))
    if not length(rows):
        return 0.0
    seconds = judge.at_least(*_unsharded(rows))
    found.add(*fitting(wish.among(rows), judge))
    return float((seconds / space.work(rows)).min()) / space.pool.speeds[-1]  # fewer replicas may all be fast


def _promising(rows: Rows, judge: Judge, found: Ranking, known: bool = True) -> NDArray[np.bool_]:
    """Which of the incomplete rows may still be good enough."""
    return judge.at_least(*_unsharded(rows), known) <= found.limit


def _unsharded(rows: Rows) -> tuple[Candidates, tuple[Ints, Ints]]:
    """Plans of one replica, and the fewest and most replicas."""
    ones = np.ones(length(rows), np.int64)
    missing = {"recomputation": ones * 0} if "recomputation" not in rows else {}
    return candidates(rows | {"dp_replicate": ones, "dp_shard": ones} | missing), (rows["least"], rows["most"])


def _most_sharded(space: Space, rows: Rows) -> Candidates:
    shards = np.minimum(rows["most"], space.sizes.dp_shard.max)
    return candidates(rows | {"dp_replicate": np.ones_like(shards), "dp_shard": shards})


def _parts(sizes: Ints, most: int) -> Iterable[slice]:
    """Runs of rows whose `sizes` sum to about `most`."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + most, side="right")))
        yield slice(first, last)
        first = last


def most_devices(space: Space, judge: Judge, wish: Wish) -> int:
    """Devices of the largest plan that counts and fits into memory; 0 when none does."""
    shapes = _possible(space, judge, wish.among(space.shapes()))
    per_replica = shapes["pp"] * shapes["cp"] * shapes["tp"]
    above = int((shapes["most"] * per_replica).max(initial=0)) + 1
    for share in _WINDOWS:
        least = int(above * share)
        some = shapes | {"least": np.maximum(shapes["least"], -(-least // per_replica))}
        rows = space.smallest(space.micro_batches(space.loads(take(some, some["least"] <= some["most"]))))
        rows = wish.among(space.replicas(rows))
        order = np.argsort(
            -rows["dp_replicate"] * rows["dp_shard"] * rows["pp"] * rows["cp"] * rows["tp"], kind="stable"
        )
        for first in range(0, len(order), _AT_A_TIME):
            some = take(rows, order[first : first + _AT_A_TIME])
            plans = candidates(space.recomputations(space.splits(some)))
            fits = judge.memory(plans) <= judge.limit_bytes
            if fits.any():
                return int(plans.devices[fits].max())
    return 0
