"""Why there is no legal plan, and the smallest change that would make one: tried before it is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

import numpy as np

from orchestrator.core.spec import AxisBounds, JobSpec
from orchestrator.core.types import Mesh, NodeCapacity
from orchestrator.planner.choose import Search
from orchestrator.planner.explain import HELD, counted, gib, where
from orchestrator.planner.hardware import CATALOGUE, find
from orchestrator.planner.judge import Judge
from orchestrator.planner.legality import Legal, axis_bounds, legal
from orchestrator.planner.outcome import Infeasible, Rejection
from orchestrator.planner.pool import Pool
from orchestrator.planner.space import Space, candidates, length, take

Attempt: TypeAlias = Callable[[JobSpec, Sequence[NodeCapacity]], Mesh | None]
"""The mesh that a changed job would take on changed nodes; None where there is still none."""
_UNLIMITED = 4096
_TIMES = 64
"""So many times the nodes are tried at most."""
_AXES = ("tp", "pp", "cp", "ep")


def before_search(spec: JobSpec, nodes: Sequence[NodeCapacity]) -> Infeasible | None:
    """What rules out every plan whatever the mesh: a device that is unknown, or too few nodes."""
    if spec.device_kind is not None and find(spec.device_kind) is None:
        need = f"spec.hardware.device auto or one of {', '.join(CATALOGUE)}"
        return Infeasible(f"hardware {spec.device_kind!r} is not in the catalogue: set {need}", (), need)
    short = spec.min_nodes - len(nodes)
    if short > 0:
        need = counted(short, "more node")
        has = f"{counted(len(nodes), 'node')} with devices {'is' if len(nodes) == 1 else 'are'} available"
        return Infeasible(f"{has} but the job needs {spec.min_nodes} (spec.nodes.min): add {need}", (), need)
    return None


def explained(nodes: Sequence[NodeCapacity], search: Search, attempt: Attempt) -> Infeasible:
    """Why `search` found nothing on `nodes`: no mesh is legal, or none fits into memory."""
    spec = search.spec
    sizes = legal(spec, _UNLIMITED)
    if not search.spaces:
        reason = f"fewer than {spec.min_nodes} nodes (spec.nodes.min) have devices that can train together"
        return _with_change(reason, (), spec, nodes, attempt) or _hopeless(reason, ())
    for axis in _AXES:
        if not getattr(sizes, axis):
            return _no_size(spec, axis, sizes)
    closest = [_closest(space, judge) for space, judge in zip(search.spaces, search.judges, strict=True)]
    found = [one for one in closest if one]
    if found:
        return _too_big(spec, nodes, min(found, key=lambda one: one[0].needed), attempt)
    pool = max((space.pool for space in search.spaces), key=lambda one: one.devices)
    return _no_mesh(spec, nodes, pool, sizes, attempt)


# ---------------------------------------------------------------- no mesh is legal


def _no_size(spec: JobSpec, axis: str, sizes: Legal) -> Infeasible:
    bounds = axis_bounds(spec, axis)
    others = {name: kept for name, kept in spec.parallelism.items() if name != axis}
    wider = getattr(legal(replace(spec, parallelism=others), _UNLIMITED), axis)
    need = f"spec.parallelism.{axis} that allows {' or '.join(map(str, wider[-4:]))}"
    why = next((item.reason for item in sizes.rejected if item.what == f"{axis} {bounds.min}"), None)
    reason = why or f"{axis} of at least {bounds.min} is more than the model allows"
    return Infeasible(f"{reason}, and no other size is within its bounds: set {need}", sizes.rejected, need)


def _no_mesh(spec: JobSpec, nodes: Sequence[NodeCapacity], pool: Pool, sizes: Legal, attempt: Attempt) -> Infeasible:
    least = {
        "pp": sizes.pp[0],
        "dp_replicate": sizes.dp_replicate.min,
        "dp_shard": sizes.dp_shard.min,
        "cp": sizes.cp[0],
        "tp": sizes.tp[0],
    }
    replicas, world = least["dp_replicate"] * least["dp_shard"], prod(least.values())
    limits = f"{spec.min_nodes} (spec.nodes.min) and {pool.devices} devices (all that is usable)"
    reason = f"no legal mesh uses between {limits}"
    if replicas > spec.global_batch:
        reason = f"a batch of {spec.global_batch} cannot feed {replicas} data-parallel replicas"
        need = f"spec.batch.global of at least {replicas}"
        if attempt(replace(spec, global_batch=replicas), nodes):
            return Infeasible(f"{reason}: set {need}", sizes.rejected, need)
    elif world > pool.devices:
        named = " x ".join(f"{axis} {size}" for axis, size in least.items() if size > 1)
        has = f"{counted(pool.devices, 'device')} {'is' if pool.devices == 1 else 'are'} usable"
        reason = f"the smallest legal mesh ({named}) needs {world} devices but {has}"
        need = counted(world - pool.devices, "more device")
        more = [replace(node, node=f"{node.node}+", devices=world - pool.devices) for node in pool.nodes[:1]]
        if attempt(replace(spec, max_nodes=len(nodes) + 1, devices_per_node=None), [*nodes, *more]):
            cap = f" or raise spec.nodes.max ({spec.max_nodes})" if len(pool.nodes) > spec.max_nodes else ""
            return Infeasible(f"{reason}: add {need}{cap}", sizes.rejected, need)
    return _with_change(reason, sizes.rejected, spec, nodes, attempt) or _hopeless(reason, sizes.rejected)


# ---------------------------------------------------------------- none fits into memory


@dataclass(frozen=True, slots=True)
class _Closest:
    """The plan that needs least memory."""

    mesh: Mesh
    needed: float
    limit: float
    device_bytes: int
    dominant: str
    rejected: tuple[Rejection, ...]


def _closest(space: Space, judge: Judge) -> tuple[_Closest, ...]:
    """The legal plan that needs least memory, if there is a legal one at all."""
    rows = space.smallest(space.micro_batches(space.largest(space.loads(space.shapes()))))
    rows = space.replicas(space.recomputations(space.even_splits(rows)))
    if not length(rows):
        return ()
    memory = judge.memory(candidates(rows))
    order = np.argsort(memory, kind="stable")
    best = candidates(take(rows, order[:1]))
    terms = judge.where_memory(best)
    name = max(terms, key=lambda one: float(terms[one][0]))
    dominant = f"{gib(float(terms[name][0]))} of it {HELD[name]}"
    listed: dict[Mesh, float] = {}
    plans = candidates(take(rows, order[:200]))
    for at in range(len(plans)):
        listed.setdefault(plans.mesh(at), float(memory[order[at]]))
    may = f"{gib(judge.limit_bytes)} may be filled"
    rejected = tuple(
        Rejection(where(mesh), f"needs {gib(bytes_)} per device, {may}") for mesh, bytes_ in list(listed.items())[:10]
    )
    return (
        _Closest(best.mesh(0), float(memory[order[0]]), judge.limit_bytes, space.pool.memory_bytes, dominant, rejected),
    )


def _too_big(
    spec: JobSpec, nodes: Sequence[NodeCapacity], closest: tuple[_Closest, ...], attempt: Attempt
) -> Infeasible:
    best = closest[0]
    reason = (
        f"the plan that needs least memory ({where(best.mesh)}) takes {gib(best.needed)} per device ({best.dominant}) "
        f"and only {gib(best.limit)} of {gib(best.device_bytes)} may be filled"
    )
    found = _with_change(reason, best.rejected, spec, nodes, attempt)
    larger = f"devices with {gib(best.needed / best.limit * best.device_bytes)}"
    if found is None:
        return Infeasible(f"{reason}: use {larger}", best.rejected, larger)
    return replace(found, reason=f"{found.reason}, or use {larger}")


def _hopeless(reason: str, rejected: tuple[Rejection, ...]) -> Infeasible:
    need = "a lower spec.nodes.min, or wider spec.parallelism bounds or a larger spec.batch.global"
    return Infeasible(f"{reason}: set {need}", rejected, need)


# ---------------------------------------------------------------- changes


def _with_change(
    reason: str, rejected: tuple[Rejection, ...], spec: JobSpec, nodes: Sequence[NodeCapacity], attempt: Attempt
) -> Infeasible | None:
    """The first single change under which there is a plan."""
    for need, changed in _settings(spec, nodes):
        mesh = attempt(changed, nodes)
        if mesh is not None:
            said = need.format(mesh=mesh)
            return Infeasible(f"{reason}: set {said}", rejected, said)
    count = _nodes_needed(spec, nodes, attempt)
    if count is None:
        return None
    most = len(nodes) + count
    need = counted(count, "more node") + (f" and spec.nodes.max {most}" if most > spec.max_nodes else "")
    return Infeasible(f"{reason}: add {need}", rejected, need)


def _settings(spec: JobSpec, nodes: Sequence[NodeCapacity]) -> Iterator[tuple[str, JobSpec]]:
    """Single changes of the job file, from those that cost nothing; `{mesh.tp}` stands for what is then chosen."""
    if spec.micro_batch is not None and spec.micro_batch > 1:
        yield "spec.batch.micro 1", replace(spec, micro_batch=1)
    if spec.zero.max < 3:
        yield "spec.parallelism.zero 3", replace(spec, zero=AxisBounds(3, 3))
    for axis in spec.parallelism:
        others = {name: kept for name, kept in spec.parallelism.items() if name != axis}
        yield f"spec.parallelism.{axis} that allows {{mesh.{axis}}}", replace(spec, parallelism=others)
    if len(nodes) > spec.max_nodes:
        yield f"spec.nodes.max {len(nodes)}", replace(spec, max_nodes=len(nodes))
    if spec.min_nodes > spec.global_batch:
        yield f"spec.batch.global of at least {spec.min_nodes}", replace(spec, global_batch=spec.min_nodes)
    if spec.min_nodes > 1:
        yield "spec.nodes.min 1", replace(spec, min_nodes=1)


def _nodes_needed(spec: JobSpec, nodes: Sequence[NodeCapacity], attempt: Attempt) -> int | None:
    """How many nodes like the largest there are would do; None when many times as many would not."""

    def enough(count: int) -> bool:
        more = [*nodes, *(replace(largest, node=f"{largest.node}+{copy}") for copy in range(count))]
        return attempt(replace(spec, max_nodes=max(spec.max_nodes, len(more))), more) is not None

    largest = max(nodes, key=lambda node: (node.memory_bytes, node.devices, node.node))
    most = 1
    while not enough(most):
        if most >= _TIMES * len(nodes):
            return None
        most *= 2
    least = most // 2 + 1
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle + 1, most)
    return most
