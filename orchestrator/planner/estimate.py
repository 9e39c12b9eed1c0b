"""The best micro-batch and recomputation of one mesh, with its cost and memory."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.spec import JobSpec, ModelSpec
from orchestrator.core.types import Mesh, Recomputation
from orchestrator.planner.batch import micro_batches
from orchestrator.planner.cost import Cost, Links, relative_cost, slowest_stage, step_cost
from orchestrator.planner.memory import USABLE, peak_bytes
from orchestrator.planner.pool import Pool


@dataclass(frozen=True, slots=True)
class Estimate:
    """One mesh on one pool."""

    mesh: Mesh
    pool: Pool
    micro_batch: int
    recomputation: Recomputation
    cost: Cost
    memory_bytes: int
    """0 when the model is not described."""
    step: float
    """Seconds, or relative units without a model."""


@dataclass(frozen=True, slots=True)
class TooBig:
    """The mesh does not fit even with the smallest micro-batch and full recomputation."""

    mesh: Mesh
    pool: Pool
    memory_bytes: int


def shortest(spec: JobSpec, pool: Pool, mesh: Mesh) -> float:
    """A time that no plan of `mesh` can beat: its computing alone."""
    samples = -(-spec.global_batch // mesh.dp_degree)
    if spec.model is None:
        return samples / (mesh.pp * mesh.tp)
    flops = slowest_stage(spec.model, mesh.pp, mesh.tp).flops
    return 3 * samples * spec.model.seq_length * flops / pool.device.flops_per_s


def estimate(spec: JobSpec, pool: Pool, mesh: Mesh) -> Estimate | TooBig:
    """The fastest way to run `mesh` that fits the memory of `pool`; memory that is unknown counts as enough."""
    samples = -(-spec.global_batch // mesh.dp_degree)
    options = micro_batches(samples, mesh.pp, spec.micro_batch)
    if spec.model is None:
        return _undescribed(pool, mesh, options)
    limit = int(pool.memory_bytes * USABLE)
    return _fastest(spec.model, pool, mesh, options, limit)


def _undescribed(pool: Pool, mesh: Mesh, options: list[tuple[int, int]]) -> Estimate:
    costs = [(relative_cost(mesh.pp, mesh.tp, *option), option) for option in options]
    cost, (size, _) = min(costs, key=lambda item: (item[0].total_s, item[1][1]))
    return Estimate(mesh, pool, size, Recomputation.NONE, cost, 0, cost.total_s)


def _fastest(model: ModelSpec, pool: Pool, mesh: Mesh, options: list[tuple[int, int]], limit: int) -> Estimate | TooBig:
    links = _links(pool, mesh)
    smallest = []
    for recomputation in Recomputation:
        least = peak_bytes(model, pool.device, mesh, *options[-1], recomputation)
        smallest.append(least)
        if limit and least > limit:
            continue
        fitting = []
        for option in options:
            memory = peak_bytes(model, pool.device, mesh, *option, recomputation)
            if limit and memory > limit:
                continue
            cost = step_cost(model, pool.device, links, mesh, *option, recomputation)
            fitting.append((cost.total_s, option[1], option[0], cost, memory))
            if mesh.pp == 1:
                break  # without a pipeline the fewest micro-batches that fit are the fastest
            if option in options[-2:-1]:
                break  # more than eight micro-batches per stage gain little: only where memory demands it
        step, _, size, cost, memory = min(fitting, key=lambda item: item[:3])
        return Estimate(mesh, pool, size, recomputation, cost, memory, step)
    return TooBig(mesh, pool, min(smallest))


def _links(pool: Pool, mesh: Mesh) -> Links:
    """Every axis at the speed inside a node where its groups lie inside nodes, else at the network's."""

    def speed(span: int) -> float:
        inside = pool.aligned(span) >= mesh.world_size
        return pool.device.node_bytes_per_s if inside else pool.device.network_bytes_per_s

    shard = mesh.tp * mesh.dp_shard
    return Links(speed(mesh.tp), speed(shard), speed(shard * mesh.dp_replicate), speed(mesh.world_size))
