"""A slow node gets fewer samples, or a smaller pipeline stage: not everybody gets its speed.

Fewer samples: unequal shares of the batch for unequal replicas.

All replicas run as many micro-batches as each other, so that their collectives pair up; a slow one runs smaller ones.
With rows per micro-batch r_i, speeds v_i and k micro-batches the step takes k max(r_i / v_i), and k sum(r_i) is at
least the batch. The fastest have m rows, and m is searched as ever; some replica has r_i = v_i t, so that t is one
number for each speed, and all rows and k follow from t. Where memory leaves room for one row there is nothing to share.

A smaller stage: equal shares, and fewer layers for the stage of the slow devices, which come last or first. Equal
shares count without a pipeline, too: where rows are few they may take fewer micro-batches.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.core.types import Assignment, BatchSplit, Mesh
from orchestrator.planner.batch import split as equal
from orchestrator.planner.candidates import Candidates, Floats, Ints
from orchestrator.planner.cost import Speeds
from orchestrator.planner.pool import Pool

_ROUND = 1e-9


@dataclass(frozen=True, slots=True)
class Shares:
    """What each of many plans gives its replicas."""

    rows: Ints
    """Rows per micro-batch, by speed (slowest first) and plan."""
    micro_batches: Ints
    """By plan."""
    speed: Floats
    """By plan, of replicas that all take as long for the largest number of rows as the longest does for its own."""


def divide(batch: Ints | int, replicas: Ints, speeds: Sequence[float], most: Ints, multiple: Ints | int = 1) -> Shares:
    """Shares of `batch` samples for `replicas` of each speed (rows: speeds, slowest first; columns: plans).

    The fastest replicas have `most` rows per micro-batch; the number of micro-batches is a multiple of `multiple`.
    """
    speed = np.asarray(speeds)[:, None]
    fastest = np.where(replicas > 0, speed, 0).max(axis=0)
    best = np.full(len(most), np.inf)
    rows, number = np.ones_like(replicas), np.ones_like(most)
    for at in speeds[::-1]:  # of equal ones that with the fewest rows
        count = np.maximum(np.ceil(most * at / fastest - _ROUND), 1)  # beyond it the fastest have one row more
        tried = np.clip(np.floor(count / at * speed + _ROUND), 1, most).astype(np.int64)
        passes = -(-batch // (replicas * tried).sum(axis=0))
        passes = -(-passes // multiple) * multiple
        took = passes * (np.where(replicas > 0, tried, 0) / speed).max(axis=0)
        within = (count / at < (most + 1) / fastest - _ROUND) & (at <= fastest)
        better = (took < best * (1 - _ROUND)) & within
        best = np.where(better, took, best)
        rows, number = np.where(better, tried, rows), np.where(better, passes, number)
    return Shares(rows, number, number * most / best)


def of_plans(pool: Pool, batch: int, plans: Candidates) -> Shares:
    """Shares of plans on a pool of several speeds, its fastest nodes first."""
    multiple = np.where(plans.interleave > 1, plans.pp, 1)
    return divide(batch, replicas_of(pool, plans), pool.speeds, plans.micro_batch, multiple)


def replicas_of(pool: Pool, plans: Candidates) -> Ints:
    """Replicas of each speed (slowest first) by plan, when the devices are taken and ranked fastest first.

    The slowest devices have the last ranks, so they lie in the last pipeline stages; a replica has the speed of its
    slowest device.
    """
    return _replicas(pool, plans.dp_replicate * plans.dp_shard, plans.pp, plans.cp * plans.tp)


def _replicas(pool: Pool, replicas: Ints, stages: Ints, width: Ints) -> Ints:
    slower = np.cumsum([devices for _, devices in pool.devices_by_speed])[:, None]
    idle = slower[-1] - replicas * stages * width
    touched = np.minimum(replicas, -(-np.maximum(slower - idle, 0) // width))
    touched[-1] = replicas
    return np.asarray(np.diff(touched, axis=0, prepend=0), np.int64)


def most_speed(pool: Pool, plans: Candidates, least: Ints, most: Ints) -> Floats:
    """The largest sum of the speeds of `least` to `most` replicas such as the one of each plan.

    With one replica more it grows by at most its speed until devices of the next speed are needed, and falls or grows
    as steadily from there: the largest is at an end, or where a speed runs out.
    """
    width, speed = plans.cp * plans.tp, np.array(pool.speeds)[:, None]
    faster = np.cumsum([devices for _, devices in pool.devices_by_speed][:0:-1])
    ends = [least, most]
    for devices in faster:
        last = devices // (plans.pp * width)
        ends += [np.clip(last, least, most), np.clip(last + 1, least, most)]
    sums = [(_replicas(pool, number, plans.pp, width) * speed).sum(axis=0) for number in ends]
    return np.asarray(np.stack(sums).max(axis=0))


def stages_of(pool: Pool, plans: Candidates, slow_first: bool = False) -> Speeds:
    """How many times as fast as the pool's slowest device the slowest of each stage is.

    The fastest devices are taken, and ranked fastest first, or with `slow_first` slowest first.
    """
    known = np.array(pool.speeds)
    slower = np.cumsum([devices for _, devices in pool.devices_by_speed])
    idle, width = slower[-1] - plans.devices, plans.devices // plans.pp

    def after(devices: Ints) -> Floats:
        """Of the slowest used device but so many."""
        return np.asarray(known[np.searchsorted(slower, idle + devices, side="right")])

    slowest, fastest = after(0 * width), after((plans.pp - 1) * width)
    between = after(np.where(plans.pp > 2, width, 0))
    return Speeds(slowest, between, fastest) if slow_first else Speeds(fastest, between, slowest)


def split(batch: int, speeds: Sequence[float], micro_batch: int, multiple: int = 1) -> BatchSplit:
    """The samples of replicas with these speeds, in micro-batches of at most `micro_batch` rows."""
    tally = Counter(speeds)
    if len(tally) == 1 and multiple == 1:
        return equal(batch, len(speeds), micro_batch)
    known = sorted(tally)
    counts = np.array([[tally[one]] for one in known])
    found = divide(batch, counts, known, np.array([micro_batch]), multiple)
    rows = [int(found.rows[known.index(one), 0]) for one in speeds]
    number = int(found.micro_batches[0])
    samples = [1] * len(rows)
    filled = [((one + 1) / rows[at], at) for at, one in enumerate(samples)]
    heapq.heapify(filled)
    for _ in range(batch - sum(samples)):  # a sample each to whoever is filled least
        at = filled[0][1]
        samples[at] += 1
        heapq.heapreplace(filled, ((samples[at] + 1) / rows[at], at))
    largest = max(-(-one // number) for one in samples)
    return BatchSplit(batch, largest, number, tuple(samples))


def replica_speeds(mesh: Mesh, assignment: Assignment, pool: Pool) -> list[float]:
    """The speed of each replica, relative to the pool's slowest device, where its ranks are assigned."""
    ranks = np.concatenate([np.full(part.devices, pool.speed_of(part.node)) for part in assignment])
    slowest = ranks.reshape(mesh.pp, mesh.dp_degree, mesh.cp * mesh.tp).min(axis=(0, 2))
    return [float(one) for one in slowest]
