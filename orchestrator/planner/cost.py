"""Seconds per step in closed form.

A pipeline runs `micro_batches` passes of its slowest stage, and the other stages once more to fill and drain (1F1B;
divided by `interleave`: Narayanan et al. 2021, arXiv:2104.04473, section 2.2). A pass is, layer by layer, the matrix
products, attention, the traffic of elementwise operations to memory, and the collectives of `tp`, `cp` and `ep`. A
product of m x k and k x n takes its operations at the measured best rate, plus its operands once through memory, which
is what makes small and thin ones inefficient. A collective over n devices moves (n - 1) / n of its bytes over the
slowest link of the group and pays log2(n) hops. Traffic of parameters and gradients hides behind computing as far as
the device's `overlap` says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from orchestrator.core.spec import ModelSpec
from orchestrator.planner.calibration import Calibration
from orchestrator.planner.candidates import Candidates, Floats, Ints
from orchestrator.planner.hardware import Machine
from orchestrator.planner.numbers import Numbers
from orchestrator.planner.transformer import (
    attention_parameters,
    attention_share,
    expert_input,
    expert_layers,
    expert_parameters,
    feed_forward_parameters,
    head_size,
    key_value_size,
    matrices,
    query_size,
    shared_parameters,
    vocabulary_parameters,
)

PRODUCTS = 0.81
"""Of the highest measured rate: what products of a training step reach when they are large."""
PRODUCTS_FP8 = 0.82
"""The same in fp8, casts and scales included."""
PRODUCTS_FP4 = 0.41
"""Of the peak in fp4, where no measured rate is published."""
EXPOSED = 0.2
"""Of the data-parallel traffic that could hide behind computing: what does not."""
EXPOSED_GATHERS = 0.3
"""The same where parameters are gathered layer by layer (ZeRO 3): the first and last ones, and shared memory paths."""
UNFUSED_ATTENTION = 0.5
"""Of the highest measured rate: batched products with scores in memory."""
SCORES = 5.0
"""Passes through memory of such scores: softmax, mask and dropout in one kernel that leaves out half of them."""
UNALIGNED = 6.0
"""How many times longer batched products take where heads are no multiple of eight numbers: no tensor cores."""
MEMORY = 0.8
"""Of the memory bandwidth: elementwise operations."""
LINK = 0.75
"""Of a link's bandwidth: large collectives."""
ALL_TO_ALL = 0.7
"""The same: tokens to their experts."""
SCANNED = 90.0
"""Passes through memory of the queries of a layer whose attention does not see all: a state-space scan, or a window."""
FUSED = 0.25
"""Of the traffic of routed tokens: what is left where experts run in one kernel."""
ROUTED = 2.5
"""Passes of a routed token through memory: sorted by expert, gathered, weighted, summed, and scattered back."""
HOST_LINK = 0.4
"""Of the time that a host on PCIe needs: one with a coherent link."""
EXPONENTIALS = 0.45
"""Of the exponentials of fused attention: what does not overlap with its products."""
BACKWARD = 2.0
"""Products of the backward pass per product of the forward pass."""
ATTENTION_BACKWARD = 2.5
"""Operations of fused attention backward (scores are computed again) per operation forward."""
OPTIMIZER_BYTES = 28
"""Traffic of one Adam update per parameter: four fp32 numbers read, three written."""
INTERLEAVED = 0.3
"""Of what the stages of an interleaved pipeline send: what does not overlap with other chunks."""
CASTS = 1.0
"""Passes through memory of what products below 16 bits read and write."""
UNCAST = 0.5
"""Of the launches per expert: what is left in 16 bits, where nothing is cast."""
GROUPED = 0.5
"""Of the rate of one product: the products of several experts in one launch."""


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

    first: Floats
    """Of the only stage, where there is one."""
    middle: Floats
    """Of all between the first and the last."""
    last: Floats


@dataclass(frozen=True, slots=True)
class Layer:
    """One (mean) layer of each plan, seconds per micro-batch and device."""

    forward: Floats
    backward: Floats
    scores: Floats
    """Of `forward`, attention."""
    products: Floats
    """Of `forward`, the matrix products."""
    last: Floats
    """Of these, the one at the end of a layer without experts, whose result its backward pass does not need."""
    tensor: Floats
    """Collectives of `tp` of a forward pass; the backward pass has as many."""
    context: Floats
    expert: Floats


def collective_s(size_bytes: Floats, group: Ints, bytes_per_s: Floats, latency_s: float) -> Floats:
    """Seconds of an all-gather or reduce-scatter whose full tensor has `size_bytes`."""
    hops = np.ceil(np.log2(np.maximum(group, 1)))
    return np.where(group <= 1, 0.0, (group - 1) / group * size_bytes / (LINK * bytes_per_s) + hops * latency_s)


def link(machine: Machine, span: Ints, stride: Ints | int = 1) -> Floats:
    """Bytes per second and device of a group that spans so many devices in rank order and takes every `stride`-th.

    Its members inside a domain share their network adapters: what comes in through one is handed on inside.
    """
    device = machine.device
    members = np.maximum(machine.domain // stride, 1)
    outside = np.minimum(device.node_bytes_per_s, members * device.network_bytes_per_s)
    outside = np.minimum(outside, rack_link(machine, span, stride))
    return np.where(span <= machine.domain, device.node_bytes_per_s, outside)


def rack_link(machine: Machine, span: Ints, stride: Ints | int) -> Floats | float:
    """Bytes per second and device of such a group on its way from rack to rack; infinite where it lies in one.

    All groups of the rack share what may leave it. Ranks lie rack by rack, so that of a group's members in a rack only
    the last one sends to the next rack: a ring of few groups is not slowed, a group of one member in each rack is most.
    """
    if not machine.rack:
        return np.inf
    members = np.maximum(machine.rack / stride, 1.0)
    between = members * machine.device.network_bytes_per_s / machine.oversubscription
    return np.where(span <= machine.rack, np.inf, between)


def product_s(machine: Machine, numbers: Numbers, m: Any, n: Any, k: Any, share: Any = 1.0) -> Floats:
    """Seconds of a product of m x k and k x n."""
    device = machine.device
    eighth = numbers.narrows and device.fp8_flops_per_s > 0
    fourth = numbers.precision == "fp4" and device.fp4_flops_per_s > 0
    rate = device.fp8_flops_per_s * PRODUCTS_FP8 * numbers.narrow if eighth else device.flops_per_s * PRODUCTS
    rate = device.fp4_flops_per_s * PRODUCTS_FP4 if fourth else rate
    wide = 1.5 if eighth else device.number_bytes
    work = 2.0 * m * n * k / (rate * share)
    return np.asarray(work + wide * (m * n + m * k + n * k) / device.memory_bytes_per_s, np.float64)


def layer_s(model: ModelSpec, machine: Machine, plans: Candidates, numbers: Numbers) -> Layer:
    """The mean layer of each plan."""
    tokens = plans.micro_batch * (model.seq_length / plans.cp)
    products = _products(model, machine, plans, numbers, tokens)
    with_experts = expert_layers(model) / model.layers
    last = (1 - with_experts) * product_s(machine, numbers, tokens, model.hidden, model.ffn_hidden / plans.tp)
    scores, scores_back = _attention(model, machine, plans, numbers, tokens)
    passes = _elementwise_bytes(model, machine, plans, numbers) * tokens / (machine.device.memory_bytes_per_s * MEMORY)
    overhead = (machine.device.overhead_s + numbers.overhead_s) / 3
    wide = machine.device.number_bytes
    around = tokens * model.hidden * wide
    seen, hop_s = 1 - numbers.tensor_overlap, machine.device.latency_s
    # Two all-gathers and two reduce-scatters, or two all-reduces.
    tensor = seen * 4 * collective_s(around, plans.tp, link(machine, plans.tp), hop_s)
    pair = 2 * key_value_size(model) / plans.tp * tokens * wide * plans.cp
    spread = link(machine, plans.tp * plans.cp, plans.tp)
    context = seen * collective_s(pair, plans.cp, spread, hop_s)
    backward = BACKWARD / 2 if numbers.frozen else BACKWARD
    # Devices with a link of their own to the host wait less for it than those on PCIe.
    waiting = numbers.routing_s * (HOST_LINK if machine.domain > 8 else 1.0) * with_experts
    return Layer(
        forward=np.maximum(products + scores + passes + overhead, waiting),
        backward=np.maximum(backward * products + scores_back + 2 * passes + 2 * overhead, 2 * waiting),
        scores=scores,
        products=products,
        last=last,
        tensor=tensor,
        context=context,
        expert=_all_to_all(model, machine, plans, numbers, tokens),
    )


def _products(model: ModelSpec, machine: Machine, plans: Candidates, numbers: Numbers, tokens: Floats) -> Floats:
    """The matrix products of a layer, forward."""
    hidden, tp = model.hidden, plans.tp

    def product(n: Any, k: Any) -> Floats:
        return product_s(machine, numbers, tokens, n, k)

    query, pair, gates = query_size(model), 2 * key_value_size(model), matrices(model) - 1
    total = product((query + pair) / tp, hidden) + product(hidden, query / tp)
    with_experts = expert_layers(model) / model.layers
    dense = product(gates * model.ffn_hidden / tp, hidden) + product(hidden, model.ffn_hidden / tp)
    if not with_experts:
        return total + dense
    # Every device computes the tokens of `ep` devices on its own share of the experts.
    local = np.maximum(model.experts / plans.ep, 1.0)
    divided = numbers.expert_tensor(tp)
    each = tokens * model.experts_per_token / local * divided / tp
    width, entry = model.expert_hidden / divided, expert_input(model)
    alone = GROUPED + (1 - GROUPED) * (local == 1)
    experts = local * (
        product_s(machine, numbers, each, gates * width, entry, alone)
        + product_s(machine, numbers, each, entry, width, alone)
    )
    shared = 0.0 * total
    if not _grouped(model, machine, numbers):
        experts = experts + local * numbers.expert_s * (1.0 if numbers.narrows else UNCAST)
    if model.expert_input:
        shared = 2 * product(model.expert_input / tp, hidden)
    if model.shared_hidden:
        shared = shared + product(gates * model.shared_hidden / tp, hidden) + product(hidden, model.shared_hidden / tp)
    return total + (1 - with_experts) * dense + with_experts * (experts + shared)


def _grouped(model: ModelSpec, machine: Machine, numbers: Numbers) -> bool:
    """Whether products, activation and casts of all experts of a device run in one kernel."""
    blackwell = machine.device.fp4_flops_per_s > 0
    return numbers.fused_experts and matrices(model) == 3 and numbers.precision == "fp8" and blackwell


def _attention(
    model: ModelSpec, machine: Machine, plans: Candidates, numbers: Numbers, tokens: Floats
) -> tuple[Floats, Floats]:
    """Scores and weighted sum of a layer: (forward, backward)."""
    device, size = machine.device, query_size(model) / plans.tp * attention_share(model)
    if numbers.fused_attention:
        rate = min(device.flops_per_s * numbers.attention, numbers.attention_limit)
        pairs = tokens * model.seq_length / 2  # half is masked out
        products = 4.0 * pairs * size / rate
        softmax = EXPONENTIALS * pairs * size / head_size(model) / device.exponentials_per_s
        return products + softmax, ATTENTION_BACKWARD * products + softmax
    slow = 1.0 if head_size(model) % 8 == 0 else UNALIGNED
    forward = 4.0 * tokens * model.seq_length * size * slow / (device.flops_per_s * UNFUSED_ATTENTION)
    passes = SCORES * tokens * model.seq_length * model.heads / plans.tp * device.number_bytes
    forward = forward + passes / (device.memory_bytes_per_s * MEMORY)
    return forward, 2.0 * forward


def _elementwise_bytes(model: ModelSpec, machine: Machine, plans: Candidates, numbers: Numbers) -> Floats:
    """Traffic of norms, residuals, activation and rotation of a layer per token, forward."""
    hidden, tp, wide = model.hidden, plans.tp, machine.device.number_bytes
    around = np.where(np.asarray(numbers.sequence_parallel), tp, 1)
    outer = (8 if numbers.fused else 14) * hidden / around
    with_experts = expert_layers(model) / model.layers
    # Tokens are sorted by expert and back, weighted and summed.
    routed = model.experts_per_token * ((matrices(model) + 1) * model.expert_hidden + ROUTED * expert_input(model))
    if _grouped(model, machine, numbers):
        routed *= FUSED
    width = (1 - with_experts) * (matrices(model) + (0 if numbers.fused else 2)) * model.ffn_hidden
    width += with_experts * (routed + (matrices(model) + 1) * model.shared_hidden)
    scanned = SCANNED * (1 - attention_share(model)) * query_size(model)
    inner = (2 * (query_size(model) + key_value_size(model)) + scanned + width) / tp
    gathered = tp if numbers.narrow_inputs else 1  # cast before they are gathered, or after it by every rank
    casts = CASTS / numbers.narrow if numbers.narrows else 0.0
    return np.asarray(wide * (outer + inner + casts * (2 * hidden / gathered + (2 * hidden + width) / tp)))


def _all_to_all(model: ModelSpec, machine: Machine, plans: Candidates, numbers: Numbers, tokens: Floats) -> Floats:
    """Tokens to their experts and back, forward."""
    with_experts = expert_layers(model) / model.layers
    if not with_experts:
        return 0.0 * tokens
    device = machine.device
    # Tokens go out in the type of the products, and come back in 16 bits.
    wide = 1.5 if device.fp8_flops_per_s and numbers.narrows else device.number_bytes
    size = tokens * model.experts_per_token * expert_input(model) * wide / plans.tp
    inside = np.minimum(plans.ep, machine.domain / np.minimum(plans.tp, machine.domain)) / plans.ep
    # A token goes once to each domain that has an expert for it, and there once to each device.
    domains, chosen = 1 / inside, model.experts_per_token
    near, each = np.maximum(plans.ep * inside, 1), np.maximum(chosen * inside, 1)
    distinct = domains * (1 - (1 - inside) ** chosen) / chosen
    away = np.maximum(1 - inside, machine.oversubscription * _other_racks(machine, plans))
    outside = away * distinct / device.network_bytes_per_s
    handed = near * (1 - (1 - 1 / near) ** each) / each
    seconds = size * ((1 - 1 / plans.ep) * handed / device.node_bytes_per_s + outside) / ALL_TO_ALL
    seen = 1 - numbers.expert_overlap * (plans.interleave > 1)
    return with_experts * 2 * np.where(plans.ep == 1, 0.0, seen * seconds + 2 * device.latency_s)


def _other_racks(machine: Machine, plans: Candidates) -> Floats | float:
    """Share of the experts of a token that are in other racks."""
    if not machine.rack:
        return 0.0
    return 1 - np.minimum(plans.ep, np.maximum(machine.rack / plans.tp, 1.0)) / plans.ep


def time_terms(
    model: ModelSpec,
    machine: Machine,
    plans: Candidates,
    numbers: Numbers,
    calibration: Calibration | None = None,
    speeds: Speeds | None = None,
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

    layers: Ints | Floats
    logits: Floats
    """Seconds of the output projection, where it is the last stage, at the machine's speed."""
    speed: Floats | float
    others_s: Floats
    """Seconds that one micro-batch takes in all other stages."""


def _slowest_stage(
    model: ModelSpec, plans: Candidates, work_s: Floats, wait_s: Floats, logits_s: Floats, speeds: Speeds | None
) -> _Slowest:
    """`work_s` and `wait_s` are a layer's seconds of computing, which faster devices shorten, and of collectives."""
    last = np.where(plans.pp == 1, plans.layers_first, plans.layers_last)
    if speeds is None:
        layer_s, inner = work_s + wait_s, np.maximum(plans.layers_first, plans.layers_middle)
        heavy = last * layer_s + logits_s >= inner * layer_s
        slowest = np.where(heavy, last * layer_s + logits_s, inner * layer_s)
        return _Slowest(
            np.where(heavy, last, inner),
            np.where(heavy, logits_s, 0.0),
            1.0,
            model.layers * layer_s + logits_s - slowest,
        )
    between = np.where(plans.pp > 2, model.layers - plans.layers_first - plans.layers_last, 0)
    speed = np.stack([speeds.first, speeds.middle, np.where(plans.pp == 1, speeds.first, speeds.last)])
    layer_s = work_s / speed + wait_s
    took = np.stack([plans.layers_first, plans.layers_middle, last]) * layer_s
    took[2] += logits_s / speed[2]
    which = took.argmax(axis=0)[None, :]
    which[:, plans.pp == 1] = 2

    def of(column: Floats) -> Floats:
        return np.asarray(np.take_along_axis(column, which, axis=0)[0])

    layers = of(np.stack([plans.layers_first, plans.layers_middle, last]).astype(np.float64))
    whole = np.where(plans.pp == 1, 0.0, took[0]) + between * layer_s[1] + took[2]
    return _Slowest(layers, np.where(which[0] == 2, logits_s, 0.0), of(speed), whole - of(took))


def _again(numbers: Numbers, layer: Layer) -> tuple[Floats, Floats]:
    """(Selective, full) recomputation of a layer."""
    if not numbers.stops_early:
        return layer.scores if not numbers.fused_attention else 0.12 * layer.forward, layer.forward
    elementwise = layer.forward - layer.products - layer.scores
    return numbers.products_again * layer.products + elementwise, layer.forward - layer.last


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
