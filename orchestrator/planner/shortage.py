"""Why there is no legal plan, and the smallest change that would make one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import NodeCapacity
from orchestrator.planner.estimate import TooBig
from orchestrator.planner.explain import counted, gib, where
from orchestrator.planner.hardware import CATALOGUE, find
from orchestrator.planner.legality import ONE_UNLESS_ASKED, axis_bounds, legal
from orchestrator.planner.memory import USABLE
from orchestrator.planner.outcome import Infeasible, Rejection
from orchestrator.planner.pool import Pool

_UNLIMITED = 4096


def before_search(spec: JobSpec, nodes: Sequence[NodeCapacity]) -> Infeasible | None:
    """What rules out every plan whatever the mesh: an axis or a device that is unknown, or too few nodes."""
    for axis in ONE_UNLESS_ASKED:
        if axis_bounds(spec, axis).min > 1:
            rejection = Rejection(f"{axis} {axis_bounds(spec, axis).min}", f"{axis} is not supported yet")
            need = f"spec.parallelism.{axis}.min 1"
            return Infeasible(f"{axis} above 1 is not supported yet: set {need}", (rejection,), need)
    if spec.device_kind is not None and find(spec.device_kind) is None:
        need = f"spec.hardware.device auto or one of {', '.join(CATALOGUE)}"
        return Infeasible(f"hardware {spec.device_kind!r} is not in the catalogue: set {need}", (), need)
    short = spec.min_nodes - len(nodes)
    if short > 0:
        need = counted(short, "more node")
        has = f"{counted(len(nodes), 'node')} with devices {'is' if len(nodes) == 1 else 'are'} available"
        return Infeasible(f"{has} but the job needs {spec.min_nodes} (spec.nodes.min): add {need}", (), need)
    return None


def no_mesh(spec: JobSpec, pools: Sequence[Pool]) -> Infeasible:
    """No mesh is legal on any of `pools`."""
    pool = max(pools, key=lambda item: (item.devices, len(item.nodes)))
    sizes = legal(spec, _UNLIMITED)
    for axis, found in (("tp", sizes.tp), ("pp", sizes.pp)):
        if not found:
            return _no_size(spec, axis, sizes.rejected)
    least = {
        "pp": sizes.pp[0],
        "dp_replicate": sizes.dp_replicate.min,
        "dp_shard": sizes.dp_shard.min,
        "tp": sizes.tp[0],
    }
    replicas = least["dp_replicate"] * least["dp_shard"]
    if replicas > spec.global_batch:
        need = f"spec.batch.global of at least {replicas}"
        reason = f"a batch of {spec.global_batch} cannot feed {replicas} data-parallel replicas: set {need}"
        return Infeasible(reason, sizes.rejected, need)
    world = replicas * least["pp"] * least["tp"]
    if world > pool.devices:
        need = counted(world - pool.devices, "more device")
        named = " x ".join(f"{axis} {size}" for axis, size in least.items() if size > 1)
        has = f"{counted(pool.devices, 'device')} {'is' if pool.devices == 1 else 'are'} usable"
        reason = f"the smallest legal mesh ({named}) needs {world} devices but {has}: add {need}{_cap(spec, pool)}"
        return Infeasible(reason, sizes.rejected, need)
    need = "a lower spec.nodes.min, or wider spec.parallelism bounds or a larger spec.batch.global"
    limits = f"{spec.min_nodes} (spec.nodes.min) and {pool.devices} devices (all that is usable)"
    reason = f"no legal mesh uses between {limits}: set {need}"
    return Infeasible(reason, sizes.rejected, need)


def _cap(spec: JobSpec, pool: Pool) -> str:
    return f" or raise spec.nodes.max ({spec.max_nodes})" if len(pool.nodes) > spec.max_nodes else ""


def _no_size(spec: JobSpec, axis: str, rejected: tuple[Rejection, ...]) -> Infeasible:
    bounds = axis_bounds(spec, axis)
    others = {name: kept for name, kept in spec.parallelism.items() if name != axis}
    wider = getattr(legal(replace(spec, parallelism=others), _UNLIMITED), axis)
    need = f"spec.parallelism.{axis} that allows {' or '.join(map(str, wider[-4:]))}"
    why = next((item.reason for item in rejected if item.what == f"{axis} {bounds.min}"), None)
    reason = why or f"{axis} of at least {bounds.min} is more than the model allows"
    return Infeasible(f"{reason}, and no other size is within its bounds: set {need}", rejected, need)


def too_big(spec: JobSpec, found: Sequence[TooBig], enough: int | None) -> Infeasible:
    """Every mesh needs more memory than there is; `enough` devices of the same kind would do."""
    best = min(found, key=lambda item: (item.memory_bytes, item.mesh))
    usable = int(best.pool.memory_bytes * USABLE)
    per_device = f"devices with {gib(best.memory_bytes / USABLE)}"
    need = f"about {counted(enough, 'device')} of this kind" if enough else per_device
    change = f"{need}, or {per_device}" if enough else need
    reason = (
        f"the plan that needs least memory ({where(best.mesh)}) takes {gib(best.memory_bytes)} per device and only "
        f"{gib(usable)} of {gib(best.pool.memory_bytes)} may be filled: use {change}"
    )
    return Infeasible(reason, memory_rejections(found), need)


def memory_rejections(found: Sequence[TooBig], most: int = 10) -> tuple[Rejection, ...]:
    """Meshes that do not fit, nearest first, the rest as a number."""
    ordered = sorted(found, key=lambda item: (item.memory_bytes, item.mesh))
    shown = [
        Rejection(
            where(item.mesh),
            f"needs {gib(item.memory_bytes)} per device, {gib(item.pool.memory_bytes * USABLE)} may be filled",
        )
        for item in ordered[:most]
    ]
    if len(ordered) > most:
        shown.append(Rejection(f"{len(ordered) - most} more meshes", "need still more memory per device"))
    return tuple(shown)
