"""Sizes of published models, for measurements that name a model only.

From each model's `config.json` or paper; what our `ModelSpec` cannot say is nearest to what it costs. DeepSeek's and
Kimi's latent attention is keys and values with its number of weights. Nemotron 3 alternates mixers (attention or
Mamba) with experts: a layer here is a mixer of the mean number of weights and, in all but `dense_layers`, experts.
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.core.spec import ModelSpec


def _dense(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, seq: int, gated: bool = True
) -> ModelSpec:
    return ModelSpec(layers, hidden, heads, kv_heads, ffn, vocab, seq, gated_ffn=gated)


def _experts(
    base: ModelSpec,
    head: int,
    experts: int,
    chosen: int,
    width: int,
    shared: int = 0,
    dense: int = 0,
    full: int | None = None,
    entry: int | None = None,
) -> ModelSpec:
    return replace(
        base, head_size=head, experts=experts, experts_per_token=chosen, expert_hidden=width, shared_hidden=shared,
        dense_layers=dense, full_attention_layers=full, expert_input=entry,
    )  # fmt: skip


MODELS = {
    "llama-2-7b": _dense(32, 4096, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": _dense(40, 5120, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": _dense(80, 8192, 64, 8, 28672, 32000, 4096),
    "llama-3-8b": _dense(32, 4096, 32, 8, 14336, 128256, 8192),
    "llama-3-70b": _dense(80, 8192, 64, 8, 28672, 128256, 8192),
    "llama-3-405b": _dense(126, 16384, 128, 8, 53248, 128256, 8192),
    "gpt3-5b": _dense(24, 4096, 32, 32, 16384, 51200, 2048, gated=False),
    "gpt3-20b": _dense(44, 6144, 48, 48, 24576, 51200, 2048, gated=False),
    "gpt3-175b": _dense(96, 12288, 96, 96, 49152, 51200, 2048, gated=False),
    "nemotron-8b": _dense(32, 4096, 32, 32, 16384, 256000, 4096, gated=False),
    "nemotron-15b": _dense(32, 6144, 48, 8, 24576, 256000, 4096, gated=False),
    "nemotron-22b": _dense(40, 6144, 48, 48, 24576, 256000, 4096, gated=False),
    "nemotron-340b": _dense(96, 18432, 96, 8, 73728, 256000, 4096, gated=False),
    "mixtral-8x7b": _experts(_dense(32, 4096, 32, 8, 14336, 32000, 4096), 128, 8, 2, 14336),
    "mixtral-8x22b": _experts(_dense(56, 6144, 48, 8, 16384, 32768, 4096), 128, 8, 2, 16384),
    "qwen3-30b-a3b": _experts(_dense(48, 2048, 32, 4, 6144, 151936, 4096), 128, 128, 8, 768),
    "qwen3-235b-a22b": _experts(_dense(94, 4096, 64, 4, 12288, 151936, 4096), 128, 128, 8, 1536),
    "gpt-oss-20b": _experts(_dense(24, 2880, 64, 8, 2880, 201088, 4096), 64, 32, 4, 2880, full=12),
    "gpt-oss-120b": _experts(_dense(36, 2880, 64, 8, 2880, 201088, 4096), 64, 128, 4, 2880, full=18),
    "deepseek-v3": _experts(_dense(61, 7168, 128, 20, 18432, 129280, 4096), 96, 256, 8, 2048, 2048, 3),
    "kimi-k2": _experts(_dense(61, 7168, 64, 28, 18432, 163840, 4096), 128, 384, 8, 2048, 2048, 1),
    "nemotron-3-nano": _experts(
        _dense(29, 2688, 32, 20, 1, 131072, 8192, gated=False), 128, 128, 6, 1856, 3712, dense=6, full=6
    ),
    "nemotron-3-super": _experts(
        _dense(48, 4096, 64, 29, 1, 131072, 8192, gated=False),
        *(128, 512, 22, 2688, 5376),
        dense=8,
        full=4,
        entry=1024,
    ),
}
"""Published models by a plain name; the sequence is the usual one of pre-training."""


_SPELLINGS = (
    *(("llama2", "llama-2"), ("llama31", "llama-3"), ("llama3", "llama-3"), ("3.1", "3"), ("deepseekv", "deepseek-v")),
    *(("nemotron3-", "nemotron-"), ("nemotron4-", "nemotron-")),
)


def known(name: str) -> ModelSpec | None:
    """The model that a table calls `name`, such as `Llama-3.1-70B` or `Qwen3_235B_a22B (tokendrop)`."""
    plain = name.lower().split("(")[0].replace("_", "-").replace(" ", "-").strip("-")
    for old, new in _SPELLINGS:
        plain = plain.replace(old, new)
    return MODELS.get(plain)
