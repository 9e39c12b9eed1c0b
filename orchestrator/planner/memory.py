"""Peak memory per device, in bytes, from the shapes alone.

States: master weight and two moments of Adam, divided over `dp_shard` from ZeRO 1 on; gradients from 2, parameters
from 3 (Rajbhandari et al. 2020, arXiv:1910.02054). Activations kept per layer, token and hidden unit in 16 bits: 34
bytes with fused attention, of which 10 are not divided over `tp` without sequence parallelism, and `5 heads seq /
hidden` more with scores in memory; 2 for a layer's input alone under full recomputation (Korthikanti et al. 2022,
arXiv:2205.05198, equations 1 to 6; widths other than 4 x hidden, grouped keys and gates are counted as what they are).
A pipeline runs 1F1B: stage i of p keeps p - i micro-batches, with v model chunks per stage `1 + (p - 1) / (p v)` times
as much (section 4.2.3 there). The fullest of the first, a middle and the last stage counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from orchestrator.core.spec import ModelSpec
from orchestrator.planner.candidates import Candidates, Floats, Ints
from orchestrator.planner.hardware import Machine
from orchestrator.planner.numbers import Numbers
from orchestrator.planner.transformer import (
    attention_parameters,
    expert_input,
    expert_layers,
    expert_parameters,
    feed_forward_parameters,
    key_value_size,
    matrices,
    query_size,
    shared_parameters,
    vocabulary_parameters,
)

USABLE = 0.93
"""Share of a device's memory that a plan may fill: the rest is for fragmentation and the model's error."""


@dataclass(frozen=True, slots=True)
class MemoryTerms:
    """Bytes on the fullest device of each plan."""

    states: Floats
    """Master weights and moments."""
    gradients: Floats
    parameters: Floats
    """In the working type, as far as they lie gathered at one time."""
    activations: Floats
    """Of one micro-batch on its way through a stage."""
    in_flight: Floats
    """Of further micro-batches that wait for their backward pass."""
    logits: Floats
    working: Floats
    """What the computing of one layer needs and frees again."""
    communication: Floats
    """Buckets of gradients and gathered weights under way."""
    constant: Floats

    @property
    def total(self) -> Floats:
        """Their sum."""
        return np.asarray(sum(getattr(self, one.name) for one in fields(self)))

    def dominant(self, index: int) -> str:
        """The largest term of one plan."""
        return max((one.name for one in fields(self)), key=lambda name: float(getattr(self, name)[index]))

    def take(self, index: int) -> MemoryTerms:
        """The terms of one plan, as arrays of length 1."""
        return MemoryTerms(*(getattr(self, one.name)[index : index + 1] for one in fields(self)))


def kept_bytes(model: ModelSpec, plans: Candidates, numbers: Numbers, wide: int) -> tuple[Floats, Floats]:
    """(All activations of one layer, those kept between the passes) per token of a device, before `cp`."""
    hidden, tp = model.hidden, plans.tp
    around = np.where(np.asarray(numbers.sequence_parallel), tp, 1)
    query, pair = query_size(model), 2 * key_value_size(model)
    with_experts = expert_layers(model) / model.layers
    dense = matrices(model) * model.ffn_hidden
    # An expert's input is gathered, too; tokens go to `experts_per_token` of them.
    routed = model.experts_per_token * (matrices(model) * model.expert_hidden + 2 * expert_input(model))
    feed_forward = (1 - with_experts) * dense + with_experts * (routed + matrices(model) * model.shared_hidden)
    outer = wide * 2 * hidden + (0 if numbers.fused else 2 * hidden)  # the norms' inputs; dropout masks
    inputs = query + 2 * hidden + feed_forward / matrices(model)
    narrow = numbers.narrow_inputs and numbers.narrows
    inner = wide * (2 * query + pair + 2 * hidden + feed_forward) - (wide / 2 * inputs if narrow else 0)
    scores = 0 if numbers.fused_attention else (2 * wide + 1) * model.heads * model.seq_length
    everything = outer / around + (inner + scores) / tp
    selective = outer / around + inner / tp
    full = wide * hidden / around
    return everything, np.choose(plans.recomputation, [everything, selective * _SELECTIVE if not scores else selective,
                                                       full])  # fmt: skip


_SELECTIVE = 0.45
"""Of all activations, with fused attention: outputs of products are kept, elementwise ones computed again."""


def memory_terms(model: ModelSpec, machine: Machine, plans: Candidates, numbers: Numbers) -> MemoryTerms:
    """Estimated peak of each plan, term by term."""
    wide = machine.device.number_bytes
    everything, kept = kept_bytes(model, plans, numbers, wide)
    tokens = plans.micro_batch * (model.seq_length / plans.cp)
    last = np.where(plans.pp == 1, plans.layers_first, plans.layers_last)
    ends = np.where(plans.pp == 1, 1 if model.tied_embeddings else 2, 1)
    stages = [
        (plans.layers_first, ends, plans.pp, plans.pp == 1),
        (plans.layers_middle, 0 * ends, np.maximum(plans.pp - 1, 1), plans.pp < 0),
        (last, ends, np.ones_like(plans.pp), plans.pp > 0),
    ]
    found = np.stack([
        _stage(model, machine, plans, numbers, (layers, tables, depth, output), tokens, everything, kept)
        for layers, tables, depth, output in stages
    ])  # fmt: skip
    fullest = found.sum(axis=1).argmax(axis=0)
    return MemoryTerms(*np.take_along_axis(found, fullest[None, None, :], axis=0)[0])


def _stage(
    model: ModelSpec,
    machine: Machine,
    plans: Candidates,
    numbers: Numbers,
    stage: tuple[Ints, Ints, Ints, Ints],
    tokens: Floats,
    everything: Floats,
    kept: Floats,
) -> Floats:
    """The terms of one stage, one row each."""
    layers, tables, depth, output = stage
    wide, tp = machine.device.number_bytes, plans.tp
    shared, expert = _weights(model)
    table = vocabulary_parameters(model)
    # Experts are divided over `ep`, which takes its ranks from the data-parallel ones.
    expert_tp = numbers.expert_tensor(tp)
    expert_weights = layers * expert / plans.ep / expert_tp
    weights = (layers * shared + tables * table) / tp + expert_weights
    # The context-parallel ranks of a group hold the same weights, so that states are divided over them, too.
    shards = plans.dp_shard * np.where(plans.zero > 0, plans.cp, 1)
    shared_weights = (layers * shared + tables * table) / tp
    owned = shared_weights / shards + expert_weights / np.maximum(shards * tp / expert_tp / plans.ep, 1)
    divided = np.where(plans.zero >= 1, owned, weights)
    trained = 0.0 if numbers.frozen else 1.0
    states = trained * numbers.optimizer_bytes * divided
    summed = np.where((plans.zero >= 2) & (plans.pp > 1) & (plans.dp_shard > 1), wide * weights, 0.0)
    gradients = trained * (numbers.gradient_bytes * np.where(plans.zero >= 2, owned, weights) + summed)
    one = shared / tp + expert / plans.ep / expert_tp
    # In a pipeline nothing is gathered again for every micro-batch, and gradients are summed before they are scattered.
    whole = np.where((plans.zero == 3) & (plans.pp == 1), np.minimum(weights, 2 * np.maximum(one, table / tp)), weights)
    # A lone fp32 shard is used where it lies; anything else is gathered, or cast to 16 bits.
    parameters = np.where((plans.dp_shard == 1) & (wide == 4), 0.0, wide * whole)
    # Older pipelines keep a stage's output, too, until its gradient is there.
    output_bytes = np.where((plans.pp > 1) & (not numbers.fused), wide * model.hidden * tokens, 0.0)
    unit = kept * tokens
    chunks = np.where(plans.interleave > 1, 1 + (plans.pp - 1) / (plans.pp * plans.interleave), 1.0)
    waiting = np.minimum(plans.micro_batches, depth) * chunks
    activations = layers * unit + output_bytes
    in_flight = activations * np.maximum(waiting - 1, 0.0)
    again = np.where(plans.recomputation == 0, 0.0, 1.0)
    working = again * (everything - kept) * tokens + 2 * wide * tokens * model.hidden
    vocabulary = (numbers.logit_bytes + wide) * tokens * model.vocab / tp
    logits = np.where(output, vocabulary, 0.0)
    constant = np.zeros_like(states) + (numbers.process_bytes if machine.device.backend == "nccl" else 0)
    buckets = np.where(plans.zero == 3, 2 * wide * np.maximum(one, 0), 0.0)
    return np.stack([states, gradients, parameters, activations, in_flight, logits, working, buckets, constant])


def _weights(model: ModelSpec) -> tuple[float, float]:
    """Of the mean layer: (weights that every rank of a `tp` group shares in, weights of all experts)."""
    with_experts = expert_layers(model) / model.layers
    shared = attention_parameters(model) + (1 - with_experts) * feed_forward_parameters(model)
    if with_experts:
        shared += with_experts * shared_parameters(model)
    return shared, with_experts * model.experts * expert_parameters(model)
