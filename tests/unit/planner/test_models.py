"""Counts, memory and cost against numbers worked out by hand or published."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from orchestrator.core.spec import ModelSpec
from orchestrator.planner.batch import split
from orchestrator.planner.candidates import Candidates
from orchestrator.planner.cost import time_terms
from orchestrator.planner.hardware import CATALOGUE, GIB, Machine, find
from orchestrator.planner.links import LINK, collective_s, link
from orchestrator.planner.memory import MemoryTerms, memory_terms
from orchestrator.planner.numbers import Numbers
from orchestrator.planner.transformer import layer_flops, parameters, split_layers
from tests.unit.planner.jobs import EXAMPLE, LLAMA_8B, LLAMA_70B

GPT2 = ModelSpec(12, 768, 12, 12, 3072, 50257, 1024, tied_embeddings=True, gated_ffn=False)


def test_parameters_of_known_models() -> None:
    assert parameters(LLAMA_8B) == pytest.approx(8.03e9, rel=0.001)
    assert parameters(LLAMA_70B) == pytest.approx(70.6e9, rel=0.001)
    # 124.44 M less position embeddings (0.79 M), biases and the final norm
    assert parameters(GPT2) == pytest.approx(123.6e6, rel=0.002)


def test_forward_flops_are_two_per_weight_and_attention() -> None:
    tiny = ModelSpec(1, 2, 1, 1, 3, 5, 7)
    weights = 4 * 2 * 2 + 3 * 2 * 3 + 2 * 2
    assert layer_flops(tiny) == 2 * weights + 2 * 7 * 2


def test_layers_are_split_evenly_with_the_rest_in_front() -> None:
    assert split_layers(8, 3) == (3, 3, 2)
    assert split_layers(8, 4) == (2, 2, 2, 2)
    assert split_layers(5, 4) == (2, 1, 1, 1)


def test_batches_are_split_exactly() -> None:
    assert split(512, 7, 74).samples == (74, 73, 73, 73, 73, 73, 73)
    assert split(7, 3, 2).micro_batches == 2
    assert split(3, 3, 1).samples == (1, 1, 1)


H100 = Machine.of(CATALOGUE["h100"], 8)
PLAIN = Numbers()


def plans(model: ModelSpec, **choices: int) -> Candidates:
    """One plan; what is not named is 1, or what follows from the rest."""
    pp = choices.get("pp", 1)
    split = split_layers(model.layers, pp)
    known = {
        "pp": pp, "interleave": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "ep": 1, "zero": 3,
        "micro_batch": 1, "micro_batches": 1, "recomputation": 0, "layers_first": split[0],
        "layers_middle": split[1] if pp > 2 else 0, "layers_last": split[-1],
    } | choices  # fmt: skip
    return Candidates(**{name: np.array([value], np.int64) for name, value in known.items()})


def memory(model: ModelSpec, **choices: int) -> MemoryTerms:
    return memory_terms(model, H100, plans(model, **choices), PLAIN)


def seconds(model: ModelSpec, machine: Machine = H100, **choices: int) -> float:
    return float(time_terms(model, machine, plans(model, **choices), PLAIN).total[0])


def test_states_are_divided_over_shards_and_tensor_groups() -> None:
    one = memory(LLAMA_8B)
    assert one.states[0] == pytest.approx(12 * 8.03e9, rel=0.001)
    assert one.gradients[0] == pytest.approx(4 * 8.03e9, rel=0.001)
    assert one.parameters[0] == pytest.approx(2 * 2 * 525e6, rel=0.01)  # two gathered embedding tables in bf16
    assert memory(LLAMA_8B, tp=8).states[0] == pytest.approx(one.states[0] / 8)
    assert memory(LLAMA_8B, dp_shard=8).states[0] == pytest.approx(one.states[0] / 8)
    assert memory(LLAMA_8B, dp_replicate=8).states[0] == one.states[0]


def test_zero_stages_divide_states_then_gradients_then_parameters() -> None:
    none, first, second, third = (memory(LLAMA_8B, dp_shard=4, zero=stage) for stage in range(4))
    assert first.states[0] == none.states[0] / 4 == third.states[0]
    assert first.gradients[0] == none.gradients[0] == 4 * second.gradients[0]
    assert second.parameters[0] == none.parameters[0] > 3 * third.parameters[0]


def test_kept_activations_are_those_of_the_published_formula() -> None:
    """34 bytes per token and hidden unit (Korthikanti et al. 2022, equation 2 less scores), dropout masks apart."""
    model = ModelSpec(1, 1024, 16, 16, 4096, 50000, 2048, gated_ffn=False)
    found = memory(model)
    per_unit = found.activations[0] / (2048 * 1024)
    assert per_unit == pytest.approx(34 - 2)
    scores = memory_terms(model, H100, plans(model), Numbers(fused_attention=False))
    assert (scores.activations - found.activations)[0] == 5 * 16 * 2048 * 2048
    assert memory(model, recomputation=2).activations[0] == 2 * 2048 * 1024


def test_a_pipeline_keeps_as_many_micro_batches_as_stages_follow() -> None:
    model = replace(LLAMA_8B, vocab=32)
    found = memory(model, pp=4, micro_batches=16)
    assert found.in_flight[0] == pytest.approx(3 * found.activations[0])
    assert memory(model, pp=4, micro_batches=2).in_flight[0] == pytest.approx(found.activations[0])


def test_each_term_counts_once() -> None:
    found = memory(LLAMA_8B, pp=2, tp=2, micro_batch=2, micro_batches=4)
    parts = [getattr(found, name)[0] for name in MemoryTerms.__slots__]
    assert found.total[0] == pytest.approx(sum(parts))
    assert found.constant[0] == PLAIN.process_bytes
    assert getattr(found, found.dominant(0))[0] == max(parts)


def test_llama_8b_on_eight_h100_is_near_what_torchtitan_reports() -> None:
    """77 to 82 GiB reserved for batch 2, sequence 8192, selective recomputation, FSDP over 8 H100 (2024-12 report)."""
    found = memory(LLAMA_8B, dp_shard=8, micro_batch=2, recomputation=1).total[0]
    assert 0.7 * 79 * GIB < found < 1.25 * 79 * GIB


def test_recomputation_trades_memory_for_time() -> None:
    kinds = [{"dp_shard": 8, "recomputation": kind} for kind in range(3)]
    used = [memory(LLAMA_8B, **kind).total[0] for kind in kinds]
    assert used == sorted(used, reverse=True)
    step = [seconds(LLAMA_8B, **kind) for kind in kinds]
    assert step == sorted(step)
    assert step[2] / step[0] == pytest.approx(4 / 3, rel=0.1)


def test_a_pipeline_pays_its_bubble() -> None:
    fast = replace(CATALOGUE["h100"], latency_s=0.0, overhead_s=0.0, node_bytes_per_s=1e18, network_bytes_per_s=1e18)
    model = replace(LLAMA_8B, vocab=32)
    terms = time_terms(model, Machine.of(fast, 8), plans(model, pp=4, micro_batches=12), PLAIN)
    assert terms.bubble[0] / (terms.total - terms.optimizer)[0] == pytest.approx(3 / 15, rel=0.01)
    halved = time_terms(model, Machine.of(fast, 8), plans(model, pp=4, micro_batches=12, interleave=2), PLAIN)
    assert halved.bubble[0] == pytest.approx(terms.bubble[0] / 2, rel=0.01)


def test_the_slowest_stage_counts() -> None:
    even = seconds(EXAMPLE, pp=4, micro_batches=64)
    uneven = seconds(EXAMPLE, pp=4, micro_batches=64, layers_first=4, layers_middle=2, layers_last=0)
    assert uneven > 1.3 * even


def test_groups_beyond_the_domain_pay_the_network() -> None:
    """All adapters of a node serve its members of a group, one alone where it has one member there."""
    slow = Machine.of(replace(CATALOGUE["h100"], latency_s=0.0), 8, 6.25e9)
    inside, outside = (time_terms(LLAMA_8B, slow, plans(LLAMA_8B, tp=tp), PLAIN).tensor[0] for tp in (8, 16))
    assert outside / inside == pytest.approx(450 / (8 * 6.25) * (15 / 16) / (7 / 8), rel=0.02)
    assert link(slow, np.array([64]), 1)[0] == 8 * link(slow, np.array([64]), 8)[0] == 8 * 6.25e9


def test_groups_beyond_the_rack_pay_the_thinner_network() -> None:
    """As far as they have fewer members in a rack than it is thinner."""
    racks = replace(H100, rack=32, oversubscription=8.0)
    spans = np.array([8, 32, 33, 64])
    assert (link(H100, spans, 8) / link(racks, spans, 8)).tolist() == [1, 1, 2, 2]
    experts = replace(LLAMA_8B, experts=64, experts_per_token=2, expert_hidden=1024)
    inside = plans(experts, pp=2, dp_replicate=2, dp_shard=4, ep=2, tp=2)
    assert time_terms(experts, racks, inside, PLAIN) == time_terms(experts, H100, inside, PLAIN)
    for across, thinner in (
        ({"pp": 2, "tp": 32}, {"pipeline"}),
        ({"pp": 2, "dp_replicate": 2, "dp_shard": 2, "tp": 16}, {"pipeline", "data"}),
        ({"dp_replicate": 4, "dp_shard": 16}, {"data"}),
        ({"dp_shard": 8, "tp": 8, "ep": 8}, {"data", "expert"}),
        ({"cp": 8, "tp": 8}, {"data", "context"}),
        ({"tp": 64}, {"tensor"}),
    ):
        found = plans(experts, **across)
        near, far = (time_terms(experts, machine, found, PLAIN) for machine in (H100, racks))
        slower = {one.name for one in fields(near) if getattr(far, one.name)[0] > getattr(near, one.name)[0]}
        assert slower - {"bubble"} == thinner


def test_collectives() -> None:
    groups = np.array([1, 4])
    found = collective_s(np.array([100.0, 100.0]), groups, np.array([10.0, 10.0]), 0.5)
    assert found.tolist() == pytest.approx([0.0, 7.5 / LINK + 2 * 0.5])


def test_experts_divide_over_their_axis() -> None:
    model = replace(LLAMA_8B, experts=8, experts_per_token=2, expert_hidden=14336)
    assert parameters(model) == pytest.approx(47.5e9, rel=0.001)  # Mixtral 8x7B (46.7e9), with a larger vocabulary
    alone, spread = (memory(model, dp_shard=8, ep=ep, zero=1).gradients[0] for ep in (1, 8))
    assert alone / spread == pytest.approx(47.5 / (47.5 - 45.1 * 7 / 8), rel=0.01)
    apart = time_terms(model, H100, plans(model, dp_shard=8, ep=8), PLAIN)
    assert apart.expert[0] > 0 == time_terms(model, H100, plans(model, dp_shard=8), PLAIN).expert[0]


def test_many_plans_are_estimated_as_each_alone() -> None:
    several = [plans(LLAMA_70B, pp=pp, tp=tp, micro_batches=8) for pp in (1, 2, 8) for tp in (1, 8)]
    names = Candidates.__slots__
    together = Candidates(*(np.concatenate([getattr(one, name) for one in several]) for name in names))
    assert time_terms(LLAMA_70B, H100, together, PLAIN).total.tolist() == [
        float(time_terms(LLAMA_70B, H100, one, PLAIN).total[0]) for one in several
    ]
    assert memory_terms(LLAMA_70B, H100, together, PLAIN).total.tolist() == [
        float(memory_terms(LLAMA_70B, H100, one, PLAIN).total[0]) for one in several
    ]


def test_hardware_is_found_by_catalogue_and_driver_names() -> None:
    assert find("NVIDIA A100-SXM4-80GB") is CATALOGUE["a100"]
    assert find("cpu") is CATALOGUE["cpu"]
    assert find("NVIDIA GH200 480GB") is CATALOGUE["gh200"]
    assert find("NVIDIA A100-PCIE-40GB") is CATALOGUE["a100-40gb"]
    assert find("") is None
