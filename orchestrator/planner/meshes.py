"""Enumerates the meshes worth estimating on a pool: all where there are few, a spread where there are many."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from orchestrator.core.spec import AxisBounds, JobSpec
from orchestrator.core.types import Mesh
from orchestrator.planner.legality import Legal
from orchestrator.planner.pool import Pool

_ALL_UP_TO = 16
_SHARDED = (8, 32, 128, 512)
"""Sizes of `dp_shard` beside which replicating the whole state (`dp_replicate`) is tried where the job file does not
speak of it: with fewer shards it costs memory and saves little."""


def meshes(spec: JobSpec, pool: Pool, legal: Legal, previous: Mesh | None) -> list[Mesh]:
    """Legal meshes of `spec` on `pool` that occupy at least `min_nodes` devices, in no order."""
    found = set()
    for tp in legal.tp:
        for pp in legal.pp:
            replicas = min(pool.devices // (pp * tp), spec.global_batch)
            if replicas == 0:
                break
            for dp_replicate, dp_shard in _data_parallel(spec, legal, replicas):
                found.add(Mesh(pp=pp, dp_replicate=dp_replicate, dp_shard=dp_shard, tp=tp))
    if previous is not None and _fits(spec, pool, legal, previous):
        found.add(previous)
    return [mesh for mesh in found if mesh.world_size >= spec.min_nodes]


def _data_parallel(spec: JobSpec, legal: Legal, most: int) -> Iterator[tuple[int, int]]:
    """(dp_replicate, dp_shard) pairs of at most `most` replicas of the batch."""
    shard = legal.dp_shard
    for dp_replicate in _replicate_sizes(spec, legal, most):
        limit = min(most // dp_replicate, shard.max)
        for dp_shard in _shard_sizes(shard, limit, dp_replicate, spec.global_batch):
            yield dp_replicate, dp_shard


def _replicate_sizes(spec: JobSpec, legal: Legal, most: int) -> list[int]:
    bounds, shard = legal.dp_replicate, legal.dp_shard
    top = min(bounds.max, most // shard.min)
    free = "dp_replicate" not in spec.parallelism and shard.max >= most  # shards alone can use every device
    if not free and top <= bounds.min + _ALL_UP_TO:
        return list(range(bounds.min, top + 1))
    sizes = {bounds.min, top, bounds.prefer or bounds.min, most // shard.max}
    sizes |= {most // shards for shards in _SHARDED if shards < most}
    if free:
        sizes -= {size for size in sizes if size > 1 and most // size < _SHARDED[0]}
    return sorted(size for size in sizes if bounds.min <= size <= top)


def _shard_sizes(bounds: AxisBounds, limit: int, dp_replicate: int, global_batch: int) -> list[int]:
    if limit < bounds.min:
        return []
    if limit <= _ALL_UP_TO:
        return list(range(bounds.min, limit + 1))
    samples = ceil(global_batch / (dp_replicate * limit))
    fewest = ceil(global_batch / samples / dp_replicate)  # as few shards as keep the slowest replica's samples
    sizes = {limit, fewest, bounds.min, bounds.prefer or limit}
    if dp_replicate == 1:
        sizes |= {limit >> power for power in range(limit.bit_length())}
    return sorted(size for size in sizes if bounds.min <= size <= limit)


def _fits(spec: JobSpec, pool: Pool, legal: Legal, mesh: Mesh) -> bool:
    """The previous mesh is legal now, so that it can be kept even where the spread leaves it out."""
    return (
        mesh.world_size <= pool.devices
        and mesh.dp_degree <= spec.global_batch
        and mesh.pp in legal.pp
        and mesh.tp in legal.tp
        and legal.dp_replicate.min <= mesh.dp_replicate <= legal.dp_replicate.max
        and legal.dp_shard.min <= mesh.dp_shard <= legal.dp_shard.max
        and mesh.cp == mesh.ep == 1
    )
