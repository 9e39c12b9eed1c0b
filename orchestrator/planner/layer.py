"""Seconds of one transformer layer: products, attention, traffic of elementwise operations to memory, collectives.

A product of m x k and k x n takes its operations at the measured best rate, plus its operands once through memory: that
is what makes small and thin ones inefficient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.core.spec import ModelSpec
from orchestrator.planner.candidates import Candidates, Floats
from orchestrator.planner.hardware import Machine
from orchestrator.planner.links import collective_s, link
from orchestrator.planner.numbers import Numbers
from orchestrator.planner.transformer import (
    attention_share,
    expert_input,
    expert_layers,
    head_size,
    key_value_size,
    matrices,
    query_size,
)

PRODUCTS = 0.81
"""Of the highest measured rate: what products of a training step reach when they are large."""
PRODUCTS_FP8 = 0.82
"""The same in fp8, casts and scales included."""
PRODUCTS_FP4 = 0.41
"""Of the peak in fp4, where no measured rate is published."""
UNFUSED_ATTENTION = 0.5
"""Of the highest measured rate: batched products with scores in memory."""
SCORES = 5.0
"""Passes through memory of such scores: softmax, mask and dropout in one kernel that leaves out half of them."""
UNALIGNED = 6.0
"""How many times longer batched products take where heads are no multiple of eight numbers: no tensor cores."""
MEMORY = 0.8
"""Of the memory bandwidth: elementwise operations."""
ALL_TO_ALL = 0.7
"""The same: tokens to their experts."""
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
CASTS = 1.0
"""Passes through memory of what products below 16 bits read and write."""
UNCAST = 0.5
"""Of the launches per expert: what is left in 16 bits, where nothing is cast."""


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
    alone = np.where(local == 1, 1.0, numbers.grouped)
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
    scanned = numbers.scanned * (1 - attention_share(model)) * query_size(model)
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
    handed = near * (1 - (1 - 1 / near) ** each) / each
    if numbers.in_order:
        local = np.maximum(model.experts / plans.ep, 1.0)
        distinct = np.minimum(distinct, 1 / chosen + 1 / (local * near))
        handed = np.minimum(handed, 1 / chosen + 1 / local)
    away = np.maximum(1 - inside, machine.oversubscription * _other_racks(machine, plans))
    outside = away * distinct / device.network_bytes_per_s
    seconds = size * ((1 - 1 / plans.ep) * handed / device.node_bytes_per_s + outside) / ALL_TO_ALL
    seen = 1 - numbers.expert_overlap * (plans.interleave > 1)
    return with_experts * 2 * np.where(plans.ep == 1, 0.0, seen * seconds + 2 * device.latency_s)


def _other_racks(machine: Machine, plans: Candidates) -> Floats | float:
    """Share of the experts of a token that are in other racks."""
    if not machine.rack:
        return 0.0
    return 1 - np.minimum(plans.ep, np.maximum(machine.rack / plans.tp, 1.0)) / plans.ep
