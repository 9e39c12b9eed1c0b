"""The rule sets that regrow brings along take every parameter of their models exactly once.

The lists are those of 2-layer models, written down from the models' published sources: Megatron-DeepSpeed's
`megatron/model/gpt_model.py` (`universal_checkpoint_info`) and `transformer.py`, bigscience's BLOOM conversion in
transformers, megatron.core's `GPTModel` with local and Transformer Engine layers, and Hugging Face's modelling files.
"""

from __future__ import annotations

import pytest

from orchestrator.checkpoint import rulefile
from orchestrator.checkpoint.language import Average, Fragment, Replicated, Unique


def layers(prefix: str, names: str, count: int = 2, first: int = 0) -> list[str]:
    return [f"{prefix}{layer}.{name}" for layer in range(first, first + count) for name in names.split()]


def both(names: str) -> str:
    return " ".join(f"{name}.weight {name}.bias" for name in names.split())


LEGACY = both(
    "input_layernorm self_attention.query_key_value self_attention.dense post_attention_layernorm mlp.dense_h_to_4h "
    "mlp.dense_4h_to_h"
)
LEGACY_LLAMA = (
    "input_layernorm.weight self_attention.query_key_value.weight self_attention.dense.weight "
    "post_attention_layernorm.weight mlp.dense_h_to_4h.weight mlp.dense_4h_to_h.weight"
)
CORE = both(
    "input_layernorm self_attention.linear_proj self_attention.linear_qkv pre_mlp_layernorm "
    "mlp.linear_fc1 mlp.linear_fc2"
)
CORE_ENGINE = (
    both("self_attention.linear_proj self_attention.linear_qkv mlp.linear_fc1 mlp.linear_fc2")
    + " self_attention.linear_qkv.layer_norm_weight self_attention.linear_qkv.layer_norm_bias"
    + " mlp.linear_fc1.layer_norm_weight mlp.linear_fc1.layer_norm_bias"
)
CORE_LLAMA = (
    "input_layernorm.weight self_attention.linear_proj.weight self_attention.linear_qkv.weight "
    "pre_mlp_layernorm.weight mlp.linear_fc1.weight mlp.linear_fc2.weight"
)
CORE_LLAMA_ENGINE = (
    "self_attention.linear_proj.weight self_attention.linear_qkv.layer_norm_weight self_attention.linear_qkv.weight "
    "mlp.linear_fc1.layer_norm_weight mlp.linear_fc1.weight mlp.linear_fc2.weight"
)
MIXTRAL = (
    "self_attention.linear_proj.weight self_attention.linear_qkv.layer_norm_weight self_attention.linear_qkv.weight "
    "pre_mlp_layernorm.weight mlp.router.weight "
)
LOCAL_EXPERTS = " ".join(
    f"mlp.experts.local_experts.{expert}.linear_fc{layer}.weight" for expert in range(2) for layer in (1, 2)
)
GROUPED_EXPERTS = " ".join(f"mlp.experts.linear_fc{layer}.weight{expert}" for layer in (1, 2) for expert in range(2))
EMBEDDINGS = ["embedding.word_embeddings.weight", "embedding.position_embeddings.weight"]
UNTIED = ["embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"]
FINAL = ["decoder.final_layernorm.weight", "decoder.final_layernorm.bias"]
OF_LANGUAGE_MODEL = [
    "language_model.embedding.word_embeddings.weight",
    "language_model.embedding.position_embeddings.weight",
    "language_model.encoder.final_layernorm.weight",
    "language_model.encoder.final_layernorm.bias",
]
OF_LANGUAGE_MODEL_LLAMA = [
    "language_model.embedding.word_embeddings.weight",
    "language_model.encoder.final_layernorm.weight",
    "language_model.output_layer.weight",
]
HF_LLAMA = (
    "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight "
    "mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight input_layernorm.weight "
    "post_attention_layernorm.weight"
)
HF_MIXTRAL = (
    "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight "
    "input_layernorm.weight post_attention_layernorm.weight "
)
HF_EXPERTS = "block_sparse_moe.gate.weight " + " ".join(
    f"block_sparse_moe.experts.{expert}.w{number}.weight" for expert in range(2) for number in (1, 2, 3)
)
HF = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
GPT2 = ["wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"]
GPT2_LAYER = both("ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj")
BLOOM = [
    "tied_modules.embed.word_embeddings.weight",
    "tied_modules.embed.word_embeddings.norm.weight",
    "tied_modules.embed.word_embeddings.norm.bias",
    "7.weight",
    "7.bias",
]
STAGED = ["tied_modules.embed.word_embeddings.weight", "tied_modules.embed.position_embeddings.weight"]

MODELS = [
    ("megatron-deepspeed-gpt", [*STAGED, *layers("", LEGACY, first=2), "5.weight", "5.bias"]),
    ("megatron-deepspeed-gpt", [*OF_LANGUAGE_MODEL, *layers("language_model.encoder.layers.", LEGACY)]),
    (
        "megatron-deepspeed-llama",
        ["1.word_embeddings.weight", *layers("", LEGACY_LLAMA, first=2), "5.weight", "6.lm_head.weight"],
    ),
    (
        "megatron-deepspeed-llama",
        [*OF_LANGUAGE_MODEL_LLAMA, *layers("language_model.encoder.layers.", LEGACY_LLAMA)],
    ),
    ("megatron-deepspeed-bloom", [*BLOOM, *layers("", LEGACY, first=3)]),
    ("megatron-lm-gpt", [*OF_LANGUAGE_MODEL, *layers("language_model.encoder.layers.", LEGACY)]),
    (
        "megatron-lm-gpt",
        [
            name.replace("layernorm", "norm")
            for name in [*OF_LANGUAGE_MODEL, *layers("language_model.encoder.layers.", LEGACY)]
        ],
    ),
    ("megatron-lm-gpt", [*EMBEDDINGS, *FINAL, *layers("decoder.layers.", CORE)]),
    ("megatron-lm-gpt", [*EMBEDDINGS, *FINAL, *layers("decoder.layers.", CORE_ENGINE)]),
    ("megatron-lm-llama", [*OF_LANGUAGE_MODEL_LLAMA, *layers("language_model.encoder.layers.", LEGACY_LLAMA)]),
    ("megatron-lm-llama", [*UNTIED, *layers("decoder.layers.", CORE_LLAMA)]),
    ("megatron-lm-llama", [*UNTIED, *layers("decoder.layers.", CORE_LLAMA_ENGINE)]),
    ("megatron-lm-mixtral", [*UNTIED, *layers("decoder.layers.", MIXTRAL + LOCAL_EXPERTS)]),
    ("megatron-lm-mixtral", [*UNTIED, *layers("decoder.layers.", MIXTRAL + GROUPED_EXPERTS)]),
    ("megatron-torch-dist-gpt", [*EMBEDDINGS, *FINAL, *layers("decoder.layers.", CORE)]),
    ("megatron-torch-dist-gpt", [*EMBEDDINGS, *FINAL, *layers("decoder.layers.", CORE_ENGINE)]),
    ("megatron-torch-dist-llama", [*UNTIED, *layers("decoder.layers.", CORE_LLAMA)]),
    ("megatron-torch-dist-llama", [*UNTIED, *layers("decoder.layers.", CORE_LLAMA_ENGINE)]),
    (
        "megatron-torch-dist-mixtral",
        [
            *UNTIED,
            *layers(
                "decoder.layers.",
                MIXTRAL + "mlp.experts.experts.linear_fc1.weight mlp.experts.experts.linear_fc2.weight",
            ),
        ],
    ),
    ("huggingface-llama", [*HF, *layers("model.layers.", HF_LLAMA)]),
    ("huggingface-gpt2", [*GPT2, *layers("h.", GPT2_LAYER)]),
    ("huggingface-gpt2", ["lm_head.weight", *(f"transformer.{name}" for name in [*GPT2, *layers("h.", GPT2_LAYER)])]),
    ("huggingface-mixtral", [*HF, *layers("model.layers.", HF_MIXTRAL + HF_EXPERTS)]),
    (
        "huggingface-mixtral",
        [*HF, *layers("model.layers.", HF_MIXTRAL + "mlp.gate.weight mlp.experts.gate_up_proj mlp.experts.down_proj")],
    ),
]


@pytest.mark.parametrize(("name", "parameters"), MODELS)
def test_every_parameter_has_one_rule_and_every_rule_a_parameter(name: str, parameters: list[str]) -> None:
    rules = rulefile.named(name)
    assert list(rules.assign(parameters)) == parameters
    assert rules.unused(parameters) == []


def test_every_rule_set_is_tested() -> None:
    assert sorted({name for name, _ in MODELS}) == rulefile.shipped()
    assert [rulefile.named(name).name for name in rulefile.shipped()] == rulefile.shipped()


@pytest.mark.parametrize(
    ("name", "parameter", "pattern"),
    [
        ("megatron-deepspeed-gpt", "3.mlp.dense_h_to_4h.bias", Fragment(0)),
        ("megatron-deepspeed-gpt", "3.mlp.dense_4h_to_h.weight", Fragment(1)),
        ("megatron-deepspeed-gpt", "3.mlp.dense_4h_to_h.bias", Replicated()),
        ("megatron-deepspeed-llama", "3.mlp.dense_h_to_4h.weight", Fragment(0, count=2)),
        ("megatron-deepspeed-bloom", "3.self_attention.dense.bias", Average()),
        ("megatron-lm-gpt", "decoder.layers.0.mlp.linear_fc1.weight", Fragment(0)),
        ("megatron-lm-llama", "decoder.layers.0.mlp.linear_fc1.weight", Fragment(0, count=2)),
        ("megatron-lm-llama", "decoder.layers.0.mlp.linear_fc2.weight", Fragment(1)),
        ("megatron-lm-llama", "decoder.layers.0.self_attention.linear_qkv.weight", Fragment(0)),
        ("megatron-lm-llama", "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", Replicated()),
        ("megatron-lm-mixtral", "decoder.layers.0.mlp.experts.linear_fc1.weight3", Fragment(0, count=2)),
        ("megatron-torch-dist-llama", "decoder.layers.0.mlp.linear_fc1.weight", Unique()),
    ],
)
def test_what_the_rules_say(name: str, parameter: str, pattern: object) -> None:
    assert rulefile.named(name).match(parameter).pattern == pattern


def test_stages_and_expert_ranks_count_from_their_own_first() -> None:
    rules = rulefile.named("megatron-lm-mixtral")
    values = {"firstLayer": 12, "firstExpert": 4}
    assert {
        name: rules.renamed(name, values)
        for name in [
            "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight",
            "decoder.layers.1.mlp.experts.linear_fc2.weight0",
            "language_model.encoder.layers.3.mlp.local_experts.1.dense_4h_to_h.weight",
            "decoder.final_layernorm.weight",
        ]
    } == {
        "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight": (
            "decoder.layers.13.mlp.experts.local_experts.6.linear_fc1.weight"
        ),
        "decoder.layers.1.mlp.experts.linear_fc2.weight0": "decoder.layers.13.mlp.experts.linear_fc2.weight4",
        "language_model.encoder.layers.3.mlp.local_experts.1.dense_4h_to_h.weight": (
            "language_model.encoder.layers.15.mlp.local_experts.5.dense_4h_to_h.weight"
        ),
        "decoder.final_layernorm.weight": "decoder.final_layernorm.weight",
    }
