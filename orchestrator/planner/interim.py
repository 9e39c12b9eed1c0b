"""Today's closed forms over arrays of plans, until `memory` and `cost` take them; see there for the sources."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from orchestrator.core.spec import ModelSpec
from orchestrator.planner.candidates import Candidates, Floats, Ints
from orchestrator.planner.hardware import Device
from orchestrator.planner.transformer import (
    attention_flops,
    layer_flops,
    layer_parameters,
    output_flops,
    vocabulary_parameters,
)

USABLE = 0.9
_KEPT = np.array([34.0, 20.0, 2.0])


@dataclass(frozen=True)
class Machine:
    """A device and its links."""

    device: Device
    devices_per_node: int
    domain: int


@dataclass(frozen=True)
class TimeTerms:
    """Seconds per step."""

    compute: Floats
    recompute: Floats
    tensor: Floats
    context: Floats
    expert: Floats
    pipeline: Floats
    bubble: Floats
    data: Floats
    optimizer: Floats

    @property
    def total(self) -> Floats:
        """Their sum."""
        return np.asarray(sum(getattr(self, one.name) for one in fields(self)))


@dataclass(frozen=True)
class MemoryTerms:
    """Bytes on the fullest device."""

    states: Floats
    parameters: Floats
    activations: Floats
    logits: Floats

    @property
    def total(self) -> Floats:
        """Their sum."""
        return np.asarray(sum(getattr(self, one.name) for one in fields(self)))


def _collective(size: Floats, group: Ints, bytes_per_s: Floats, hop_s: Floats | float) -> Floats:
    hops = np.ceil(np.log2(np.maximum(group, 1)))
    return np.where(group == 1, 0.0, (group - 1) / group * size / bytes_per_s + hops * hop_s)


def time_terms(model: ModelSpec, machine: Machine, plans: Candidates) -> TimeTerms:
    """Seconds per step of each plan."""
    device, c = machine.device, plans
    last = np.where(c.pp == 1, c.layers_first, c.layers_last)
    layers = np.maximum(np.maximum(c.layers_first, c.layers_middle), last)
    inner = np.maximum(c.layers_first, c.layers_middle) * layer_flops(model)
    flops = np.maximum(inner, last * layer_flops(model) + output_flops(model)) / (c.tp * c.cp)
    tokens, number = c.micro_batch * model.seq_length, c.micro_batches
    forward = tokens * flops / device.flops_per_s
    compute = 3 * forward + layers * device.overhead_s
    attention = layers * attention_flops(model) / (c.tp * c.cp)
    again = np.choose(c.recomputation, [0 * forward, forward * attention / flops, forward])
    activation = tokens * model.hidden * device.number_bytes / c.cp

    def speed(span: Ints) -> Floats:
        inside = span <= machine.devices_per_node
        return np.where(inside, device.node_bytes_per_s, device.network_bytes_per_s)

    times = 8 + np.where(c.recomputation == 2, 4, 0)
    tensor = layers * times * _collective(activation, c.tp, speed(c.tp), device.latency_s)
    context = layers * 6 * _collective(activation / 8, c.cp, speed(c.tp * c.cp), device.latency_s)
    send = np.where(c.pp > 1, 2 * (activation / c.tp / speed(c.devices) + device.latency_s), 0.0) * c.interleave
    ends = np.where(c.pp == 1, 1 if model.tied_embeddings else 2, 1)
    weights = (layers * layer_parameters(model) + vocabulary_parameters(model) * ends) / c.tp
    shard, hop = speed(c.tp * c.cp * c.dp_shard), device.latency_s * layers
    gathers = 2 * np.where(c.zero == 3, number, 1)
    data = gathers * _collective(weights * device.number_bytes, c.dp_shard, shard, hop)
    data += _collective(weights * 4, c.dp_shard, shard, hop)
    data += 2 * _collective(weights * 4 / c.dp_shard, c.dp_replicate, speed(c.devices // c.pp), hop)
    return TimeTerms(
        compute=number * compute,
        recompute=number * again,
        tensor=number * tensor,
        context=number * context,
        expert=np.zeros(len(c)),
        pipeline=np.asarray(number * send, np.float64),
        bubble=(c.pp - 1) / c.interleave * (compute + again + tensor + context + send),
        data=np.maximum(0.0, data - device.overlap * number * compute),
        optimizer=weights / c.dp_shard * 28 / device.memory_bytes_per_s,
    )


def memory_terms(model: ModelSpec, machine: Machine, plans: Candidates) -> MemoryTerms:
    """Bytes of each plan on its fullest stage."""
    c, wide = plans, machine.device.number_bytes
    one, table = layer_parameters(model), vocabulary_parameters(model)
    ends = 1 if model.tied_embeddings else 2
    last = np.where(c.pp == 1, c.layers_first, c.layers_last)
    unit = c.micro_batch * model.seq_length * model.hidden * wide / 2 / c.cp / c.tp
    working = np.where(c.recomputation == 0, 0.0, _KEPT[0])
    shards = np.where(c.zero > 0, c.dp_shard, 1)
    copied = np.where((c.dp_shard > 1) | (wide < 4), wide, 0)
    found = []
    for layers, tables, depth, logits in (
        (c.layers_first, np.where(c.pp == 1, ends, 1), c.pp, c.pp == 1),
        (c.layers_middle, np.zeros_like(c.pp), np.maximum(c.pp - 1, 1), c.pp < 0),
        (last, np.where(c.pp == 1, ends, 1), np.ones_like(c.pp), c.pp > 0),
    ):
        weights = (layers * one + tables * table) / c.tp
        gathered = np.where(c.zero == 3, np.minimum(weights, 2 * max(one, table) / c.tp), weights)
        kept = _KEPT[c.recomputation] * layers * np.minimum(c.micro_batches, depth)
        output = np.where(logits, (8 + wide) * c.micro_batch * model.seq_length * model.vocab / c.tp / c.cp, 0.0)
        found.append(np.stack([16 * weights / shards, copied * gathered, (kept + working) * unit, output]))
    stages = np.stack(found)
    fullest = stages.sum(axis=1).argmax(axis=0)
    terms = np.take_along_axis(stages, fullest[None, None, :], axis=0)[0]
    return MemoryTerms(*terms)
