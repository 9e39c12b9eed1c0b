"""Which sizes an axis may take, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.spec import AxisBounds, JobSpec, ModelSpec
from orchestrator.planner.outcome import Rejection

FIXED = ("cp", "ep")
"""Axes that this version keeps at 1."""
_ALL_STAGES_UP_TO = 16


@dataclass(frozen=True, slots=True)
class Legal:
    """Sizes worth trying by axis, smallest first, for a number of devices; `rejected` says why others are not."""

    pp: tuple[int, ...]
    tp: tuple[int, ...]
    dp_replicate: AxisBounds
    dp_shard: AxisBounds
    rejected: tuple[Rejection, ...]


def axis_bounds(spec: JobSpec, axis: str) -> AxisBounds:
    """Bounds of the job; an axis left out is free where the model is described, otherwise only `dp_shard` is."""
    if axis in spec.parallelism:
        return spec.parallelism[axis]
    return AxisBounds() if axis == "dp_shard" or (spec.model is not None and axis not in FIXED) else AxisBounds(1, 1)


def legal(spec: JobSpec, devices: int) -> Legal:
    """Legal sizes of every axis on at most `devices` devices."""
    rejected: list[Rejection] = []
    tp = _tensor_sizes(spec, devices, rejected)
    pp = _pipeline_sizes(spec, devices, rejected)
    for axis in FIXED:
        if axis_bounds(spec, axis).max > 1 and axis in spec.parallelism:
            rejected.append(Rejection(f"{axis} > 1", f"{axis} is not supported yet and stays 1"))
    return Legal(pp, tp, axis_bounds(spec, "dp_replicate"), axis_bounds(spec, "dp_shard"), tuple(rejected))


def why_not_tensor(model: ModelSpec, tp: int) -> str | None:
    """Why `tp` does not divide the model (sequence parallelism divides positions too), or None."""
    sizes = (
        ("heads", model.heads),
        ("kv_heads", model.kv_heads),
        ("ffn_hidden", model.ffn_hidden),
        ("vocab", model.vocab),
        ("hidden", model.hidden),
        ("seq_length", model.seq_length),
    )
    misfits = [f"{name} {size}" for name, size in sizes if size % tp]
    more = len(misfits) - 2
    named = ", ".join(misfits[:2]) + (f" and {more} more" if more > 0 else "")
    return f"tp {tp} does not divide {named}" if misfits else None


def _tensor_sizes(spec: JobSpec, devices: int, rejected: list[Rejection]) -> tuple[int, ...]:
    bounds = axis_bounds(spec, "tp")
    most = min(bounds.max, devices)
    if spec.model is None:
        return tuple(range(bounds.min, min(most, 64) + 1))
    most = min(most, spec.model.kv_heads)
    found = []
    for tp in range(bounds.min, most + 1):
        reason = why_not_tensor(spec.model, tp)
        if reason is None:
            found.append(tp)
        elif tp <= 8 or tp in {bounds.min, bounds.max, bounds.prefer}:
            rejected.append(Rejection(f"tp {tp}", reason))
    return tuple(found)


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
