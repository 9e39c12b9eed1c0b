"""Seconds per step in closed form.

A pipeline runs `micro_batches` passes of its slowest stage, and the other stages once more to fill and drain (1F1B;
divided by `interleave`: Narayanan et al. 2021, arXiv:2104.04473, section 2.2). A pass is, layer by layer, the matrix
products, attention, the traffic of elementwise operations to memory, and the collectives of `tp`, `cp` and `ep`
(`layer`, `links`). Traffic of parameters and gradients hides behind computing as far as the device's `overlap` says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from orchestrator.core.spec import ModelSpec
from orchestrator.planner.calibration import Calibration
from orchestrator.planner.candidates import Candidates, Floats, Ints
from orchestrator.planner.hardware import Machine
from orchestrator.planner.layer import BACKWARD, MEMORY, Layer, layer_s, product_s
from orchestrator.planner.links import LINK, collective_s, link, rack_link
from orchestrator.planner.numbers import Numbers
from orchestrator.planner.transformer import (
    attention_parameters,
    expert_layers,
    expert_parameters,
    feed_forward_parameters,
    shared_parameters,
    vocabulary_parameters,
)

EXPOSED = 0.2
"""Of the data-parallel traffic that could hide behind computing: what does not."""
EXPOSED_GATHERS = 0.3
"""The same where parameters are gathered layer by layer (ZeRO 3): the first and last ones, and shared memory paths."""
OPTIMIZER_BYTES = 28
"""Traffic of one Adam update per parameter: four fp32 numbers read, three written."""
PRODUCTS_AGAIN = 0.5
"""Of the products of a layer: what torch's selective recomputation does again."""
INTERLEAVED = 0.3
"""Of what the stages of an interleaved pipeline send: what does not overlap with other chunks."""


@dataclass(frozen=True, slots=True)
class TimeTerms:
    """Seconds per step of each plan; of communication, what is not hidden behind computing."""

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
        """Seconds per step."""
        return np.asarray(sum(getattr(self, one.name) for one in fields(self)))

    def take(self, index: int) -> TimeTerms:
        """The terms of one plan, as arrays of length 1."""
        return TimeTerms(*(getattr(self, one.name)[index : index + 1] for one in fields(self)))


@dataclass(frozen=True, slots=True)
class Speeds:
    """How many times as fast as the machine's device the slowest device of some pipeline stages is, of each plan."""

    first: Floats | float
    """Of the only stage, where there is one."""
    middle: Floats | float
    """Of all between the first and the last."""
    last: Floats | float


AS_FAST = Speeds(1.0, 1.0, 1.0)
"""Of stages whose devices are all as fast as each other."""


def time_terms(
    model: ModelSpec,
    machine: Machine,
    plans: Candidates,
    numbers: Numbers,
    calibration: Calibration | None = None,
    speeds: Speeds = AS_FAST,
) -> TimeTerms:
    """Seconds per step of each plan, term by term; `speeds` where pipeline stages are not all as fast."""
    layer = layer_s(model, machine, plans, numbers)
    once, passes = layer.forward + layer.backward, plans.micro_batches
    again = np.choose(plans.recomputation, [0 * once, *_again(numbers, layer)])
    more = np.where(plans.recomputation == 2, 3, 2)
    tensor, context, expert = more * layer.tensor, 2.5 * layer.context, more * layer.expert
    logits = _logits_s(model, machine, plans, numbers)
    stage = _slowest_stage(model, plans, once + again, tensor + context + expert, logits, speeds)
    send = _send_s(model, machine, plans)
    scale = 1.0 if calibration is None else calibration.factors(machine.device.name, plans.tp, plans.micro_batch)
    data = _data_s(model, machine, plans, numbers)
    overlap = machine.device.overlap if numbers.overlapped else 0.0
    exposed = np.where(plans.zero == 3, EXPOSED_GATHERS, EXPOSED)
    # Of several micro-batches only the last one's backward pass has gradients to send, and the first one's forward
    # pass parameters to wait for; parameters that lie scattered are gathered for every one.
    window = np.where((plans.zero == 3) & (plans.pp == 1), passes, 1)
    computing = (stage.layers * once + stage.logits) / stage.speed
    hidden = overlap * window * computing
    drained = stage.others_s / plans.interleave + (plans.pp - 1) * send / plans.interleave
    return TimeTerms(
        compute=scale * passes * computing,
        recompute=scale * passes * stage.layers * again / stage.speed,
        tensor=scale * passes * stage.layers * tensor,
        context=scale * passes * stage.layers * context,
        expert=scale * passes * stage.layers * expert,
        pipeline=scale * passes * send,
        bubble=scale * np.where(plans.pp > 1, drained, 0.0),
        data=np.maximum(0.0, data - hidden) + exposed * np.minimum(data, hidden),
        optimizer=_optimizer_s(model, machine, plans, numbers),
    )


@dataclass(frozen=True, slots=True)
class _Slowest:
    """The stage that the others wait for, of each plan."""

    layers: Floats
    logits: Floats
    """Seconds of the output projection, where it is the last stage, at the machine's speed."""
    speed: Floats
    others_s: Floats
    """Seconds that one micro-batch takes in all other stages."""


def _slowest_stage(
    model: ModelSpec, plans: Candidates, work_s: Floats, wait_s: Floats, logits_s: Floats, speeds: Speeds
) -> _Slowest:
    """`work_s` and `wait_s` are a layer's seconds of computing, which faster devices shorten, and of collectives."""
    alone = plans.pp == 1
    between = np.where(plans.pp > 2, model.layers - plans.layers_first - plans.layers_last, 0)
    layers = np.stack([np.where(alone, plans.layers_first, plans.layers_last), plans.layers_first, plans.layers_middle])
    speed = np.stack(np.broadcast_arrays(np.where(alone, speeds.first, speeds.last), speeds.first, speeds.middle))
    layer_s = work_s / speed + wait_s
    took = layers * layer_s
    took[0] += logits_s / speed[0]
    which = np.where(alone, 0, took.argmax(axis=0))[None, :]  # the last one, where others take as long

    def of(column: Floats) -> Floats:
        return np.asarray(np.take_along_axis(column, which, axis=0)[0])

    whole = took[0] + np.where(alone, 0.0, took[1]) + between * layer_s[2]
    return _Slowest(of(1.0 * layers), np.where(which[0] == 0, logits_s, 0.0), of(speed), whole - of(took))


def _again(numbers: Numbers, layer: Layer) -> tuple[Floats, Floats]:
    """(Selective, full) recomputation of a layer."""
    if not numbers.stops_early:
        return layer.scores if not numbers.fused_attention else 0.12 * layer.forward, layer.forward
    elementwise = layer.forward - layer.products - layer.scores
    return PRODUCTS_AGAIN * layer.products + elementwise, layer.forward - layer.last


def _logits_s(model: ModelSpec, machine: Machine, plans: Candidates, numbers: Numbers) -> Floats:
    """Output projection and loss, forward and backward; never in fp8."""
    tokens = plans.micro_batch * (model.seq_length / plans.cp)
    wide = Numbers("bf16") if numbers.narrows else numbers
    product = product_s(machine, wide, tokens, model.vocab / plans.tp, model.hidden)
    passes = 24.0 * tokens * model.vocab / plans.tp / (machine.device.memory_bytes_per_s * MEMORY)
    return (1 + (BACKWARD / 2 if numbers.frozen else BACKWARD)) * product + passes


def _send_s(model: ModelSpec, machine: Machine, plans: Candidates) -> Floats:
    """Activations to the next stage and gradients back, per micro-batch."""
    size = plans.micro_batch * (model.seq_length / plans.cp) * model.hidden * machine.device.number_bytes / plans.tp
    stage = plans.devices // np.maximum(plans.pp, 1)
    # Some two stages lie in different racks where not all of them fit into one.
    apart = np.minimum(link(machine, stage * 2, machine.domain), rack_link(machine, plans.devices, stage))
    once = size / (LINK * apart) + machine.device.latency_s
    seen = np.where(plans.interleave > 1, INTERLEAVED, 1.0)
    return np.where(plans.pp > 1, 2 * plans.interleave * once, 0.0) * seen


def _stage_weights(model: ModelSpec, plans: Candidates, numbers: Numbers) -> tuple[Floats, Floats, Floats]:
    """Of the fullest stage, per device of a `tp` group: (layers, weights without experts, experts')."""
    layers = np.maximum(np.maximum(plans.layers_first, plans.layers_middle), plans.layers_last)
    ends = np.where(plans.pp == 1, 1 if model.tied_embeddings else 2, 1)
    with_experts = expert_layers(model) / model.layers
    shared = attention_parameters(model) + (1 - with_experts) * feed_forward_parameters(model)
    shared += with_experts * shared_parameters(model)
    experts = with_experts * model.experts * expert_parameters(model)
    weights = (layers * shared + ends * vocabulary_parameters(model)) / plans.tp
    return layers, weights, layers * experts / plans.ep / numbers.expert_tensor(plans.tp)


def _data_s(model: ModelSpec, machine: Machine, plans: Candidates, numbers: Numbers) -> Floats:
    """Parameters gathered and gradients scattered over `dp_shard`, averaged over `dp_replicate`."""
    device = machine.device
    layers, weights, experts = _stage_weights(model, plans, numbers)
    trained = 0.0 if numbers.frozen else 1.0
    group = plans.dp_shard * plans.cp
    hop_s = device.latency_s * np.where(plans.zero == 3, layers, 1)
    near = link(machine, plans.tp * group, plans.tp)
    passes = np.where(plans.zero == 3, 2 * np.where(plans.pp == 1, plans.micro_batches, 1), trained)
    rare = np.maximum(group * plans.tp // numbers.expert_tensor(plans.tp) // plans.ep, 1)
    gradient = min(numbers.gradient_bytes, 4) * trained
    gathered = 1 if numbers.narrows else device.number_bytes

    def over(size: Floats, members: Ints) -> Floats:
        gather = passes * collective_s(size * gathered, members, near, 0.0)
        return gather + (1 + numbers.all_reduced) * collective_s(size * gradient, members, near, 0.0)

    hops = np.where(group > 1, np.ceil(np.log2(np.maximum(group, 1))) * hop_s * (passes + trained), 0.0)
    far = link(machine, plans.devices // np.maximum(plans.pp, 1), plans.tp * group)
    share = (weights + experts) * gradient / np.where(plans.zero >= 2, plans.dp_shard, 1)
    average = 2 * collective_s(share, plans.dp_replicate, far, device.latency_s)
    return over(weights, group) + over(experts, rare) + hops + average


def _optimizer_s(model: ModelSpec, machine: Machine, plans: Candidates, numbers: Numbers) -> Floats:
    _, weights, experts = _stage_weights(model, plans, numbers)
    shards = np.where(plans.zero >= 1, plans.dp_shard * plans.cp, 1)
    whole = plans.tp // numbers.expert_tensor(plans.tp)
    owned = weights / shards + experts / np.maximum(shards * whole // plans.ep, 1)
    trained = 0.0 if numbers.frozen else 1.0
    return np.asarray(trained * owned * OPTIMIZER_BYTES / (machine.device.memory_bytes_per_s * MEMORY))
