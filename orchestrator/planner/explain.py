"""Finds the words: why this plan, how the others compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import BatchSplit, Mesh, Recomputation
from orchestrator.planner.choose import Choice
from orchestrator.planner.estimate import Estimate
from orchestrator.planner.frontier import CLOSE
from orchestrator.planner.hardware import GIB, find
from orchestrator.planner.judge import SHARES, SLOW_FIRST
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


def layout(estimate: Estimate) -> str:
    """The plan itself in words, without why."""
    batch = estimate.batch
    text = (
        f"{where(estimate.mesh)}: {counted(batch.global_batch, 'sample')}{samples(batch)}, "
        f"{counted(batch.micro_batches, 'micro-batch')} of {batch.micro_batch}"
    )
    if estimate.interleave > 1:
        text += f", {estimate.interleave} chunks per stage"
    if estimate.zero in {1, 2}:
        text += f", ZeRO {estimate.zero}"
    if estimate.recomputation is not Recomputation.NONE:
        text += f", {estimate.recomputation} recomputation because memory does not suffice without"
    return text


def why(
    spec: JobSpec, choice: Choice, taken: Estimate, others: Sequence[Estimate], legal: Legal, available: int
) -> str:
    """The reason of the plan: what it is, what stood in the way of more, how it compares with the next best."""
    parts = [layout(taken), *choice.relaxed]
    parts.extend(_unlike(taken))
    machine = taken.pool.machine
    if spec.model is not None and 0 < machine.rack < taken.mesh.world_size:
        racks = f"racks of {counted(machine.rack, 'device')}"
        parts.append(f"the network is {machine.oversubscription:g} times thinner between {racks}")
    idle = taken.pool.devices - taken.mesh.world_size
    tensor = next((tp for tp in legal.tp if tp > 1 and taken.pool.devices % tp), None)
    if taken.mesh.tp == 1 and tensor and "tp" in spec.parallelism and not choice.relaxed:
        parts.append(f"tp {tensor} does not divide {counted(taken.pool.devices, 'device')}")
    if idle:
        parts.append(f"{idle} of {counted(taken.pool.devices, 'device')} idle")
    if available > taken.pool.devices:
        parts.append(f"{counted(available - taken.pool.devices, 'more device')} not used{_why_unused(spec, taken)}")
    if others:
        parts.append(_comparison(choice, taken, others[0]))
    parts.extend(_unchecked(spec, taken))
    return "; ".join(parts)


def _unlike(taken: Estimate) -> list[str]:
    """What devices of several speeds get."""
    if taken.way != SHARES and taken.mesh.pp == 1:
        return [f"nodes of {len(taken.pool.speeds)} speeds get equal shares, which take fewer micro-batches"]
    if taken.way != SHARES:
        first = taken.way == SLOW_FIRST
        own, others = (taken.stage_layers[0], taken.stage_layers[1:]) if first else (
            taken.stage_layers[-1], taken.stage_layers[:-1])  # fmt: skip
        where = "first" if first else "last"
        return [f"the {where} stage, on the slower nodes, has {counted(own, 'layer')}, others up to {max(others)}"]
    if taken.pool.mixed and max(taken.batch.samples) > min(taken.batch.samples) + 1:
        return [f"nodes of {len(taken.pool.speeds)} speeds get as many samples as they compute in the same time"]
    return []


def _why_unused(spec: JobSpec, taken: Estimate) -> str:
    if len(taken.pool.nodes) > spec.max_nodes:
        return f" (spec.nodes.max is {spec.max_nodes})"
    return " (slower, smaller or of another kind)"


def _unchecked(spec: JobSpec, taken: Estimate) -> Iterable[str]:
    if spec.model is None:
        yield "memory and step time not estimated because spec.model is not given"
        return
    if taken.pool.oversubscription > 1 and not taken.pool.machine.rack:
        yield "spec.hardware.rackOversubscription does not count because no node says its rack"
    kinds = [(node, find(node.kind)) for node in taken.pool.kinds]
    if any(node.memory_bytes == 0 and (kind is None or kind.memory_bytes == 0) for node, kind in kinds):
        yield f"{gib(taken.memory_bytes)} per device, not checked where nodes do not report their memory"
    unknown = {node.kind for node, kind in kinds if kind is None}
    if unknown:
        yield f"{', '.join(sorted(unknown))} is not in the hardware catalogue, so seconds are rough"


def _comparison(choice: Choice, taken: Estimate, other: Estimate) -> str:
    ratio = other.step / taken.step
    name = where(other.mesh)
    if choice.kept and ratio < CLOSE:
        gain = f"{1 / ratio:.2f}x faster" if ratio < 0.995 else "no faster"
        return f"mesh kept from the previous plan because {name} is {gain}"
    if ratio < 0.995:
        return f"{choice.ground} {name}, {1 / ratio:.2f}x faster by estimate"
    return f"{ratio:.2f}x faster than {name}" if ratio > 1.005 else f"as fast as {name}"


def compared(estimate: Estimate, taken: Estimate) -> str:
    """The reason of an alternative: what it is and how it compares with the plan that was taken."""
    ratio = estimate.step / taken.step
    if ratio >= 1:
        verdict = f"{ratio:.2f}x slower than the plan" if ratio > 1.005 else "as fast as the plan"
    else:
        verdict = f"{1 / ratio:.2f}x faster than the plan, which is preferred"
    said = lost(estimate, taken)
    return f"{layout(estimate)}; {verdict}{f' ({said})' if said else ''}"


SPENT = {
    "compute": "computing",
    "recompute": "recomputation",
    "tensor": "tp communication",
    "context": "cp communication",
    "expert": "ep communication",
    "pipeline": "pipeline transfers",
    "bubble": "pipeline bubble",
    "data": "exposed data-parallel communication",
    "optimizer": "optimizer",
}
"""What the terms of the time model are called."""


HELD = {
    "states": "optimizer states",
    "gradients": "gradients",
    "parameters": "gathered parameters",
    "activations": "activations",
    "in_flight": "activations of micro-batches in flight",
    "logits": "logits",
    "working": "working memory",
    "communication": "communication buffers",
    "constant": "what the libraries take",
}
"""What the terms of the memory model are called."""


def lost(estimate: Estimate, taken: Estimate) -> str:
    """The term that costs most more than in the plan that was taken, for example `+0.31 s pipeline bubble`."""
    if not estimate.seconds or estimate.step <= taken.step:
        return ""
    more = {name: value - taken.seconds.get(name, 0.0) for name, value in estimate.seconds.items()}
    name = max(more, key=lambda one: more[one])
    return f"+{seconds(more[name])} {SPENT[name]}"


def seconds(value_s: float) -> str:
    """Three digits and a unit: `12.3 s`, `4.56 ms`."""
    return f"{value_s:.3g} s" if value_s >= 0.1 else f"{value_s * 1000:.3g} ms"
