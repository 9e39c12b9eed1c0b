"""Which sizes an axis may take, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.spec import AxisBounds, JobSpec, ModelSpec
from orchestrator.planner.outcome import Rejection

ONE_UNLESS_ASKED = ("cp", "ep")
"""Axes that stay 1 unless the job file gives them bounds: a training script has to be written for them."""
_ALL_STAGES_UP_TO = 16
_MOST_UNDESCRIBED = 64
"""Largest tp and cp tried for a model that is not described."""


@dataclass(frozen=True, slots=True)
class Legal:
    """Sizes worth trying by axis, smallest first, for a number of devices; `rejected` says why others are not."""

    pp: tuple[int, ...]
    tp: tuple[int, ...]
    cp: tuple[int, ...]
    ep: tuple[int, ...]
    interleave: tuple[int, ...]
    zero: tuple[int, ...]
    dp_replicate: AxisBounds
    dp_shard: AxisBounds
    rejected: tuple[Rejection, ...]


def axis_bounds(spec: JobSpec, axis: str) -> AxisBounds:
    """Bounds of the job; an axis left out is free where the model is described, otherwise only `dp_shard` is."""
    if axis in spec.parallelism:
        return spec.parallelism[axis]
    free = axis == "dp_shard" or (spec.model is not None and axis not in ONE_UNLESS_ASKED)
    return AxisBounds() if free else AxisBounds(1, 1)


def legal(spec: JobSpec, devices: int) -> Legal:
    """Legal sizes of every axis on at most `devices` devices."""
    rejected: list[Rejection] = []
    return Legal(
        pp=_pipeline_sizes(spec, devices, rejected),
        tp=_tensor_sizes(spec, devices, rejected),
        cp=_context_sizes(spec, devices, rejected),
        ep=_expert_sizes(spec, devices, rejected),
        interleave=tuple(range(spec.interleave.min, min(spec.interleave.max, _layers(spec, devices)) + 1)),
        zero=tuple(range(spec.zero.min, min(spec.zero.max, 3) + 1)),
        dp_replicate=axis_bounds(spec, "dp_replicate"),
        dp_shard=axis_bounds(spec, "dp_shard"),
        rejected=tuple(rejected),
    )


def why_not_tensor(model: ModelSpec, tp: int) -> str | None:
    """Why `tp` does not divide the model (sequence parallelism divides positions too), or None."""
    sizes = [
        ("heads", model.heads),
        ("kv_heads", model.kv_heads),
        ("ffn_hidden", model.ffn_hidden),
        ("vocab", model.vocab),
        ("hidden", model.hidden),
        ("seq_length", model.seq_length),
    ]
    if model.experts:
        sizes += [("expert_hidden", model.expert_hidden), ("shared_hidden", model.shared_hidden)]
    misfits = [f"{name} {size}" for name, size in sizes if size % tp]
    more = len(misfits) - 2
    named = ", ".join(misfits[:2]) + (f" and {more} more" if more > 0 else "")
    return f"tp {tp} does not divide {named}" if misfits else None


def _layers(spec: JobSpec, otherwise: int) -> int:
    return spec.model.layers if spec.model else otherwise


def _tensor_sizes(spec: JobSpec, devices: int, rejected: list[Rejection]) -> tuple[int, ...]:
    bounds = axis_bounds(spec, "tp")
    most = min(bounds.max, devices)
    if spec.model is None:
        return tuple(range(bounds.min, min(most, _MOST_UNDESCRIBED) + 1))
    most = min(most, spec.model.kv_heads)
    found = []
    for tp in range(bounds.min, most + 1):
        reason = why_not_tensor(spec.model, tp)
        if reason is None:
            found.append(tp)
        elif tp <= 8 or tp in {bounds.min, bounds.max, bounds.prefer}:
            rejected.append(Rejection(f"tp {tp}", reason))
    return tuple(found)


def _context_sizes(spec: JobSpec, devices: int, rejected: list[Rejection]) -> tuple[int, ...]:
    bounds = axis_bounds(spec, "cp")
    length = spec.model.seq_length if spec.model else 0
    most = min(bounds.max, devices, length or _MOST_UNDESCRIBED)
    return _divisors(bounds, most, "cp", "seq_length", length, rejected)


def _expert_sizes(spec: JobSpec, devices: int, rejected: list[Rejection]) -> tuple[int, ...]:
    bounds = axis_bounds(spec, "ep")
    experts = spec.model.experts if spec.model else 0
    if bounds.max > 1 and not experts:
        rejected.append(Rejection(f"ep {max(bounds.min, 2)}", "the model has no experts"))
    return _divisors(bounds, min(bounds.max, devices, experts or 1), "ep", "experts", experts, rejected)


def _divisors(
    bounds: AxisBounds, most: int, axis: str, what: str, whole: int, rejected: list[Rejection]
) -> tuple[int, ...]:
    """Sizes within bounds that divide `whole`; any where it is 0, that is, not known."""
    found = tuple(size for size in range(bounds.min, most + 1) if whole % size == 0)
    for size in range(bounds.min, min(most, 8) + 1):
        if size not in found:
            rejected.append(Rejection(f"{axis} {size}", f"{axis} {size} does not divide {what} {whole}"))
    return found


def _pipeline_sizes(spec: JobSpec, devices: int, rejected: list[Rejection]) -> tuple[int, ...]:
    bounds = axis_bounds(spec, "pp")
    layers = spec.model.layers if spec.model else bounds.max
    most = min(bounds.max, devices, layers)
    if bounds.max > layers and spec.model and (axis := spec.parallelism.get("pp")) and axis.max < AxisBounds().max:
        rejected.append(Rejection(f"pp > {layers}", f"the model has {layers} layers"))
    named = {bounds.min, bounds.max, bounds.prefer}
    return tuple(
        pp
        for pp in range(bounds.min, most + 1)
        if pp <= _ALL_STAGES_UP_TO or layers % pp == 0 or pp & (pp - 1) == 0 or pp in named
    )
