"""Seconds per step in closed form.

A step is (micro-batches + stages - 1) passes of the slowest stage of the replica with the most samples, plus what
communication of parameters and gradients is not hidden, plus the optimizer. A collective over n devices moves
(n - 1) / n of the bytes over the slowest link of the group and pays log2(n) hops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from orchestrator.core.spec import ModelSpec
from orchestrator.core.types import Mesh, Recomputation
from orchestrator.planner.hardware import Device
from orchestrator.planner.transformer import (
    attention_flops,
    layer_flops,
    layer_parameters,
    output_flops,
    split_layers,
    vocabulary_parameters,
)

_OPTIMIZER_BYTES = 28
"""Traffic of one Adam update per parameter: four fp32 numbers read, three written."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Where the seconds of a step go; without a model they are relative units, not seconds."""

    compute_s: float = 0.0
    recompute_s: float = 0.0
    tensor_s: float = 0.0
    pipeline_s: float = 0.0
    bubble_s: float = 0.0
    data_s: float = 0.0
    optimizer_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds per step."""
        return (
            self.compute_s
            + self.recompute_s
            + self.tensor_s
            + self.pipeline_s
            + self.bubble_s
            + self.data_s
            + self.optimizer_s
        )


@dataclass(frozen=True, slots=True)
class Links:
    """Slowest bandwidth inside each group of a mesh, bytes per second."""

    tp: float
    dp_shard: float
    dp_replicate: float
    pp: float


@dataclass(frozen=True, slots=True)
class Stage:
    """The slowest pipeline stage, per device of a `tp` group."""

    layers: int
    flops: float
    """Forward, per token."""
    attention: float
    """Of these, attention."""
    parameters: float


@cache
def slowest_stage(model: ModelSpec, stages: int, tp: int) -> Stage:
    """The first stage, or the last with its output projection, whichever computes longer."""
    split = split_layers(model.layers, stages)
    first, last = split[0], split[-1]
    embedding = vocabulary_parameters(model)
    if stages == 1:
        weights = first * layer_parameters(model) + embedding * (1 if model.tied_embeddings else 2)
    else:
        weights = max(first, last) * layer_parameters(model) + embedding
    first_flops, last_flops = first * layer_flops(model), last * layer_flops(model) + output_flops(model)
    layers = last if last_flops >= first_flops else first
    flops = max(first_flops, last_flops)
    return Stage(layers, flops / tp, layers * attention_flops(model) / tp, weights / tp)


def collective_s(size_bytes: float, group: int, bytes_per_s: float, latency_s: float) -> float:
    """Seconds of an all-gather or reduce-scatter whose full tensor has `size_bytes`."""
    if group == 1:
        return 0.0
    return (group - 1) / group * size_bytes / bytes_per_s + (group - 1).bit_length() * latency_s


def step_cost(
    model: ModelSpec,
    device: Device,
    links: Links,
    mesh: Mesh,
    micro_batch: int,
    micro_batches: int,
    recomputation: Recomputation,
) -> Cost:
    """Cost of one step under `mesh`, for the replica with the most samples."""
    pp, tp = mesh.pp, mesh.tp
    stage = slowest_stage(model, pp, tp)
    tokens = micro_batch * model.seq_length
    forward_s = tokens * stage.flops / device.flops_per_s
    compute_s = 3 * forward_s + stage.layers * device.overhead_s
    again_s, again_collectives = 0.0, 0
    if recomputation is Recomputation.FULL:
        again_s, again_collectives = forward_s, 4
    elif recomputation is Recomputation.SELECTIVE:
        again_s = forward_s * stage.attention / stage.flops
    activation_bytes = tokens * model.hidden * device.number_bytes
    # Attention and feed-forward each gather and scatter once, forward and backward.
    tensor_s = stage.layers * (8 + again_collectives) * collective_s(activation_bytes, tp, links.tp, device.latency_s)
    send_s = 2 * (activation_bytes / tp / links.pp + device.latency_s) if pp > 1 else 0.0
    pass_s = compute_s + again_s + tensor_s + send_s
    data_s = _data_s(device, links, stage, mesh, 2 * micro_batches if pp == 1 else 2)
    return Cost(
        compute_s=micro_batches * compute_s,
        recompute_s=micro_batches * again_s,
        tensor_s=micro_batches * tensor_s,
        pipeline_s=micro_batches * send_s,
        bubble_s=(pp - 1) * pass_s,
        data_s=max(0.0, data_s - device.overlap * micro_batches * compute_s),
        optimizer_s=stage.parameters / mesh.dp_shard * _OPTIMIZER_BYTES / device.memory_bytes_per_s,
    )


def _data_s(device: Device, links: Links, stage: Stage, mesh: Mesh, gathers: int) -> float:
    """Parameters gathered `gathers` times, gradients scattered once over `dp_shard`, averaged over `dp_replicate`."""
    hops_s = stage.layers * device.latency_s
    parameters_s = collective_s(stage.parameters * device.number_bytes, mesh.dp_shard, links.dp_shard, hops_s)
    gradients_s = collective_s(stage.parameters * 4, mesh.dp_shard, links.dp_shard, hops_s)
    average_s = collective_s(stage.parameters * 4 / mesh.dp_shard, mesh.dp_replicate, links.dp_replicate, hops_s)
    return gathers * parameters_s + gradients_s + 2 * average_s


def relative_cost(pp: int, tp: int, micro_batch: int, micro_batches: int) -> Cost:
    """Cost of a model that is not described, in units of one sample on one device: work and bubble alone."""
    work = micro_batch * micro_batches / (pp * tp)
    return Cost(compute_s=work, bubble_s=work * (pp - 1) / micro_batches)
