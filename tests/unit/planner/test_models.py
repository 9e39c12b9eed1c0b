"""Counts, memory and cost against numbers worked out by hand or published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core.spec import ModelSpec
from orchestrator.core.types import Mesh, Recomputation
from orchestrator.planner.batch import split
from orchestrator.planner.cost import Links, collective_s, relative_cost, slowest_stage, step_cost
from orchestrator.planner.hardware import CATALOGUE, GIB, find
from orchestrator.planner.memory import peak_bytes
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


def test_states_are_divided_over_shards_and_tensor_groups() -> None:
    h100 = CATALOGUE["h100"]

    def states(mesh: Mesh) -> float:
        return peak_bytes(replace(LLAMA_8B, seq_length=1), h100, mesh, 1, 1, Recomputation.FULL)

    one = states(Mesh())
    assert one == pytest.approx(16 * 8.03e9 + 2 * 2 * 525e6, rel=0.01)  # and two gathered embedding tables in bf16
    assert states(Mesh(tp=8)) == pytest.approx(one / 8, rel=0.001)
    assert states(Mesh(dp_shard=8)) == pytest.approx(16 * 8.03e9 / 8 + 2 * 2 * 525e6, rel=0.01)
    assert states(Mesh(dp_replicate=8)) == one


def test_llama_8b_on_eight_h100_is_near_what_torchtitan_reports() -> None:
    """82 GiB reserved for batch 2, sequence 8192, selective recomputation, FSDP over 8 H100 (2024-12 report)."""
    found = peak_bytes(LLAMA_8B, CATALOGUE["h100"], Mesh(dp_shard=8), 2, 1, Recomputation.SELECTIVE)
    assert 0.6 * 82 * GIB < found < 1.2 * 82 * GIB


def test_recomputation_trades_memory_for_time() -> None:
    h100, links = CATALOGUE["h100"], Links(1e11, 1e11, 1e11, 1e11)
    memory, time_s = [], []
    for kind in Recomputation:
        memory.append(peak_bytes(LLAMA_8B, h100, Mesh(dp_shard=8), 1, 1, kind))
        time_s.append(step_cost(LLAMA_8B, h100, links, Mesh(dp_shard=8), 1, 1, kind).total_s)
    assert memory == sorted(memory, reverse=True)
    assert time_s == sorted(time_s)


def test_a_pipeline_pays_its_bubble() -> None:
    cpu, links = CATALOGUE["cpu"], Links(1e18, 1e18, 1e18, 1e18)
    free = replace(cpu, latency_s=0.0, overhead_s=0.0)
    cost = step_cost(EXAMPLE, free, links, Mesh(pp=4), 1, 12, Recomputation.NONE)
    assert cost.bubble_s / cost.total_s == pytest.approx(3 / 15, rel=0.02)


def test_the_slowest_stage_counts() -> None:
    assert slowest_stage(EXAMPLE, 3, 1).layers == 3
    assert slowest_stage(EXAMPLE, 8, 1).flops > layer_flops(EXAMPLE)  # the last stage also has the output projection
    assert slowest_stage(EXAMPLE, 1, 2).flops == slowest_stage(EXAMPLE, 1, 1).flops / 2


def test_collectives() -> None:
    assert collective_s(100.0, 1, 1.0, 5.0) == 0.0
    assert collective_s(100.0, 4, 10.0, 0.5) == pytest.approx(7.5 + 2 * 0.5)


def test_without_a_model_cost_is_the_slowest_replicas_samples() -> None:
    assert relative_cost(1, 1, 74, 1).total_s == 74
    assert relative_cost(2, 1, 5, 4).total_s == pytest.approx(20 / 2 * 5 / 4)


def test_hardware_is_found_by_catalogue_and_driver_names() -> None:
    assert find("NVIDIA A100-SXM4-80GB") is CATALOGUE["a100"]
    assert find("cpu") is CATALOGUE["cpu"]
    assert find("NVIDIA GH200 480GB") is None
    assert find("") is None
