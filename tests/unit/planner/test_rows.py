"""What a row of a table of measurements tells: its software, its network, its model, what it recomputes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.planner.evaluate import Row, predict
from orchestrator.planner.hardware import CATALOGUE, GIB
from orchestrator.planner.models import known
from orchestrator.planner.numbers import AUTOMODEL, COMPOSER, MEGATRON, MEGATRON_2022, SOFTWARE_2022, Numbers
from orchestrator.planner.rows import parse_rows

TITAN = replace(Numbers(), logit_bytes=2)
"""torchtitan of now."""
EIGHT_H100 = {"row_id": "a", "gpu": "H100", "n_gpus": "8", "gbs": "16", "model": "llama3-8b", "seq": "8192"}


def table(*rows: dict[str, str]) -> list[Row]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(row.get(name, "") for name in names) for row in rows]
    return parse_rows("\n".join([",".join(names), *lines]), "rows.csv")


def row(**cells: str) -> Row:
    return table(EIGHT_H100 | cells)[0]


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        ({}, TITAN),
        ({"software": "torchtitan 2024-10"}, replace(TITAN, logit_bytes=10)),
        ({"software": "torchtitan eager"}, replace(TITAN, fused=False)),
        ({"precision": "fp8 rowwise"}, replace(TITAN, narrow=0.57, precision="fp8")),
        ({"schedule": "async tp"}, replace(TITAN, tensor_overlap=0.75)),
        ({"schedule": "vanilla tp, not async"}, TITAN),
        ({"software": "llm-foundry 2023"}, COMPOSER),
        ({"model": "mpt-7b"}, COMPOSER),
        ({"software": "NeMo AutoModel 25.10"}, AUTOMODEL),
        ({"software": "NeMo 25.04"}, MEGATRON),
        ({"software": "Megatron-LM"}, replace(MEGATRON, fused_experts=True)),
        ({"software": "NeMo 24.01"}, MEGATRON),
        ({"software": "NeMo 26.06"}, replace(MEGATRON, fused_experts=True)),
        ({"software": "NeMo 26.04", "model": "Llama3 8B (tokendrop)"}, replace(MEGATRON, routing_s=0.0)),
        ({"software": "Megatron-LM 2023-12"}, replace(MEGATRON_2022, fused_attention=True, sequence_parallel=True)),
        ({"source": "Korthikanti 2022"}, replace(MEGATRON_2022, sequence_parallel=True)),
        ({"source": "Narayanan et al. 2021"}, MEGATRON_2022),
        ({"software": "Megatron-DeepSpeed 2022", "precision": "fp16"}, replace(SOFTWARE_2022, precision="fp16")),
        ({"software": "Megatron-DeepSpeed 2022", "precision": "bf16"}, replace(SOFTWARE_2022, gradient_bytes=6)),
        ({"notes": "LoRA r=16"}, replace(TITAN, frozen=True)),
    ],
)
def test_the_software_is_what_the_row_tells(cells: dict[str, str], numbers: Numbers) -> None:
    assert row(**cells).numbers == numbers


def test_the_latest_release_counts() -> None:
    assert row(software="NeMo 23.08", notes="measured again with 24.12").numbers == MEGATRON


def test_eager_steps_take_longer_and_attention_of_2021_longer_still() -> None:
    assert predict(row(software="eager")).step_s > predict(row()).step_s
    assert predict(row(software="Megatron-LM 2021")).step_s > 1.3 * predict(row(software="Megatron-LM 25.02")).step_s


def test_another_token_predicted_is_another_layer() -> None:
    plain, more = row(model="deepseek-v3"), row(model="DeepSeek-V3 (w/ MTP)")
    assert plain.model == replace(known("deepseek-v3"), seq_length=8192)  # type: ignore[type-var]
    assert more.model == replace(plain.model, layers=plain.model.layers + 1)


def test_what_automodel_leaves_out_is_recomputed() -> None:
    assert row(software="NeMo AutoModel").recomputation == row(recompute="full").recomputation
    assert row(software="NeMo AutoModel", recompute="none").recomputation == row(recompute="none").recomputation
    assert row().recomputation is None


def test_the_fastest_division_of_experts_is_taken_where_none_is_said() -> None:
    experts = {"model": "qwen3-30b-a3b", "n_gpus": "16", "gbs": "256", "mbs": "2", "fsdp": "16", "pp": "1"}
    steps = [predict(row(**experts, ep=str(ep))).step_s for ep in (1, 2, 4, 8, 16)]
    assert predict(row(**experts)).step_s == min(steps) < max(steps)
    assert row(model="llama3-8b").ep == 1


def test_tokens_dealt_out_in_turn_hardly_leave_a_node() -> None:
    """Eight neighbours of 256 experts are on two or three of 64 devices; at random, on seven of eight nodes."""
    said = {"model": "deepseek-v3", "n_gpus": "256", "gbs": "512", "pp": "4", "ep": "64", "mbs": "1", "fsdp": "64"}
    dealt = row(**said, software="NeMo AutoModel")
    at_random = predict(replace(dealt, numbers=replace(dealt.numbers, in_order=False)))
    assert at_random.time.expert[0] > 3 * predict(dealt).time.expert[0]


def test_a_network_holds_for_all_rows_of_its_cluster_and_for_no_others() -> None:
    said = "4x100Gb/s adapters per node"
    here, other = EIGHT_H100 | {"src": "x"}, EIGHT_H100 | {"src": "y"}
    found = table(here, here | {"interconnect": said}, other, here | {"gpu": "A100-80G"})
    rates = [one.machine.device.network_bytes_per_s for one in found]
    assert rates == [6.25e9, 6.25e9, CATALOGUE["h100"].network_bytes_per_s, CATALOGUE["a100"].network_bytes_per_s]
    disagree = table(here, here | {"interconnect": said}, here | {"interconnect": "200Gb/s per GPU"})
    rates = [one.machine.device.network_bytes_per_s for one in disagree]
    assert rates == [CATALOGUE["h100"].network_bytes_per_s, 6.25e9, 25e9]


@pytest.mark.parametrize("size", ["2", "4"])
def test_as_many_layers_are_recomputed_as_it_takes_to_fit(size: str) -> None:
    said = {"pp": "1", "mbs": size, "gbs": "32", "fsdp": "8"}
    none, full, free = (row(**said, recompute=text) for text in ("none", "full", ""))
    without, whole, partly = map(predict, (none, full, free))
    assert not without.fits and whole.fits and partly.fits
    assert whole.step_s > partly.step_s > without.step_s
    assert partly.memory_bytes == pytest.approx(CATALOGUE["h100"].memory_bytes, abs=GIB / 1024), "as full as it can be"
    share = (without.memory_bytes - partly.memory_bytes) / (without.memory_bytes - whole.memory_bytes)
    assert partly.step_s == pytest.approx(without.step_s + share * (whole.step_s - without.step_s))
    small, smaller = predict(row(pp="1", mbs="1", recompute="")), predict(row(pp="1", mbs="1", recompute="none"))
    assert small.step_s == smaller.step_s, "nothing again where all of it fits"
