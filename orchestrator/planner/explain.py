"""Finds the words: why this plan, how the others compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import BatchSplit, Mesh, Recomputation
from orchestrator.planner.choose import CLOSE, Choice
from orchestrator.planner.estimate import Estimate
from orchestrator.planner.hardware import GIB, find
from orchestrator.planner.legality import Legal


def counted(number: int, noun: str) -> str:
    """`1 device`, `2 devices`, `2 micro-batches`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"


def gib(size_bytes: float) -> str:
    """Bytes in GiB, or MiB under one."""
    return f"{size_bytes / GIB:.3g} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:.3g} MiB"


def samples(split: BatchSplit) -> str:
    """`16+16+16`, and from five replicas on `1x74+6x73`."""
    if len(split.samples) == 1:
        return ""
    if len(split.samples) <= 4:
        return " as " + "+".join(map(str, split.samples))
    runs = [(len(list(run)), size) for size, run in groupby(split.samples)]
    return " as " + "+".join(f"{number}x{size}" for number, size in runs)


def where(mesh: Mesh) -> str:
    """`dp_shard 3 on 3 devices`."""
    return str(mesh) if mesh.world_size == 1 else f"{mesh} on {mesh.world_size} devices"


def layout(estimate: Estimate, split: BatchSplit) -> str:
    """The plan itself in words, without why."""
    text = (
        f"{where(estimate.mesh)}: {counted(split.global_batch, 'sample')}{samples(split)}, "
        f"{counted(split.micro_batches, 'micro-batch')} of {split.micro_batch}"
    )
    if estimate.recomputation is not Recomputation.NONE:
        text += f", {estimate.recomputation} recomputation because memory does not suffice without"
    return text


def why(
    spec: JobSpec, choice: Choice, others: Sequence[Estimate], split: BatchSplit, legal: Legal, available: int
) -> str:
    """The reason of the plan: what it is, what stood in the way of more, how it compares with the next best."""
    taken = choice.estimate
    parts = [layout(taken, split), *choice.relaxed]
    idle = taken.pool.devices - taken.mesh.world_size
    tensor = next((tp for tp in legal.tp if tp > 1 and taken.pool.devices % tp), None)
    if taken.mesh.tp == 1 and tensor and "tp" in spec.parallelism and not choice.relaxed:
        parts.append(f"tp {tensor} does not divide {counted(taken.pool.devices, 'device')}")
    if idle:
        parts.append(f"{idle} of {counted(taken.pool.devices, 'device')} idle")
    if available > taken.pool.devices:
        parts.append(f"{counted(available - taken.pool.devices, 'more device')} not used{_why_unused(spec, taken)}")
    if others:
        parts.append(_comparison(choice, others[0]))
    parts.extend(_unchecked(spec, taken))
    return "; ".join(parts)


def _why_unused(spec: JobSpec, taken: Estimate) -> str:
    if len(taken.pool.nodes) > spec.max_nodes:
        return f" (spec.nodes.max is {spec.max_nodes})"
    return " (slower, smaller or of another kind)"


def _unchecked(spec: JobSpec, taken: Estimate) -> Iterable[str]:
    if spec.model is None:
        yield "memory and step time not estimated because spec.model is not given"
        return
    kinds = [(node, find(spec.device_kind or node.kind)) for node in taken.pool.nodes]
    if any(node.memory_bytes == 0 and (kind is None or kind.memory_bytes == 0) for node, kind in kinds):
        yield f"{gib(taken.memory_bytes)} per device, not checked where nodes do not report their memory"
    unknown = {node.kind for node, kind in kinds if kind is None}
    if unknown:
        yield f"{', '.join(sorted(unknown))} is not in the hardware catalogue, so seconds are rough"


def _comparison(choice: Choice, other: Estimate) -> str:
    ratio = other.step / choice.estimate.step
    name = where(other.mesh)
    if choice.kept and ratio < CLOSE:
        gain = f"{1 / ratio:.2f}x faster" if ratio < 0.995 else "no faster"
        return f"mesh kept from the previous plan because {name} is {gain}"
    if ratio < 0.995:
        return f"{choice.ground} {name}, {1 / ratio:.2f}x faster by estimate"
    return f"{ratio:.2f}x faster than {name}" if ratio > 1.005 else f"as fast as {name}"


def compared(estimate: Estimate, split: BatchSplit, taken: Estimate) -> str:
    """The reason of an alternative: what it is and how it compares with the plan that was taken."""
    ratio = estimate.step / taken.step
    if ratio >= 1:
        verdict = f"{ratio:.2f}x slower than the plan" if ratio > 1.005 else "as fast as the plan"
    else:
        verdict = f"{1 / ratio:.2f}x faster than the plan, which is preferred"
    return f"{layout(estimate, split)}; {verdict}{_spent(estimate)}"


_SPENT = {
    "tensor_s": "tp communication",
    "data_s": "exposed data-parallel communication",
    "bubble_s": "pipeline bubble",
    "pipeline_s": "pipeline transfers",
    "recompute_s": "recomputation",
}


def _spent(estimate: Estimate) -> str:
    """The largest part of the step that is not useful computing, where it matters."""
    name = max(_SPENT, key=lambda part: float(getattr(estimate.cost, part)))
    share = float(getattr(estimate.cost, name)) / estimate.step
    return f" ({share:.0%} of its step is {_SPENT[name]})" if share >= 0.05 else ""
