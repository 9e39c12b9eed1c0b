"""Sizes of published models, for measurements that name a model only.

From each model's `config.json` or paper; what our `ModelSpec` cannot say is nearest to what it costs. DeepSeek's and
Kimi's latent attention is keys and values with its number of weights. Nemotron 3 alternates mixers (attention or
Mamba) with experts: a layer here is a mixer of the mean number of weights and, in all but `dense_layers`, experts.
"""

from __future__ import annotations

import re
from dataclasses import replace

from orchestrator.core.spec import ModelSpec


def _dense(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, seq: int, gated: bool = True
) -> ModelSpec:
    return ModelSpec(layers, hidden, heads, kv_heads, ffn, vocab, seq, gated_ffn=gated)


def _tied(base: ModelSpec) -> ModelSpec:
    return replace(base, tied_embeddings=True)


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
    "llama-7b": _dense(32, 4096, 32, 32, 11008, 32000, 2048),
    "llama-13b": _dense(40, 5120, 40, 40, 13824, 32000, 2048),
    "llama-33b": _dense(60, 6656, 52, 52, 17920, 32000, 2048),
    "llama-65b": _dense(80, 8192, 64, 64, 22016, 32000, 2048),
    "llama-2-7b": _dense(32, 4096, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": _dense(40, 5120, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": _dense(80, 8192, 64, 8, 28672, 32000, 4096),
    "llama-3-1b": _tied(_dense(16, 2048, 32, 8, 8192, 128256, 8192)),
    "llama-3-3b": _tied(_dense(28, 3072, 24, 8, 8192, 128256, 8192)),
    "llama-3-8b": _dense(32, 4096, 32, 8, 14336, 128256, 8192),
    "llama-3-70b": _dense(80, 8192, 64, 8, 28672, 128256, 8192),
    "llama-3-405b": _dense(126, 16384, 128, 8, 53248, 128256, 8192),
    "mistral-7b": _dense(32, 4096, 32, 8, 14336, 32000, 4096),
    "qwen2.5-7b": _dense(28, 3584, 28, 4, 18944, 152064, 4096),
    "qwen2.5-14b": _dense(48, 5120, 40, 8, 13824, 152064, 4096),
    "qwen2.5-32b": _dense(64, 5120, 40, 8, 27648, 152064, 4096),
    "qwen2.5-72b": _dense(80, 8192, 64, 8, 29568, 152064, 4096),
    "qwen3-8b": _dense(36, 4096, 32, 8, 12288, 151936, 4096),
    "qwen3-14b": _dense(40, 5120, 40, 8, 17408, 151936, 4096),
    "qwen3-32b": replace(_dense(64, 5120, 64, 8, 25600, 151936, 4096), head_size=128),
    "gemma-7b": _tied(replace(_dense(28, 3072, 16, 16, 24576, 256000, 8192), head_size=256)),
    "gemma-2-9b": _tied(replace(_dense(42, 3584, 16, 8, 14336, 256128, 8192), head_size=256)),
    "gemma-2-27b": _tied(replace(_dense(46, 4608, 32, 16, 36864, 256128, 8192), head_size=128)),
    "gpt3-5b": _dense(24, 4096, 32, 32, 16384, 51200, 2048, gated=False),
    "gpt3-20b": _dense(44, 6144, 48, 48, 24576, 51200, 2048, gated=False),
    "gpt3-175b": _dense(96, 12288, 96, 96, 49152, 51200, 2048, gated=False),
    "gpt-neox-20b": _dense(44, 6144, 64, 64, 24576, 50432, 2048, gated=False),
    "opt-30b": _tied(_dense(48, 7168, 56, 56, 28672, 50272, 2048, gated=False)),
    "opt-66b": _tied(_dense(64, 9216, 72, 72, 36864, 50272, 2048, gated=False)),
    "opt-175b": _tied(_dense(96, 12288, 96, 96, 49152, 50272, 2048, gated=False)),
    "bloom-176b": _tied(_dense(70, 14336, 112, 112, 57344, 250880, 2048, gated=False)),
    "falcon-40b": _tied(_dense(60, 8192, 128, 8, 32768, 65024, 2048, gated=False)),
    "falcon-180b": _tied(_dense(80, 14848, 232, 8, 59392, 65024, 2048, gated=False)),
    "mpt-1b": _tied(_dense(24, 2048, 16, 16, 8192, 50368, 2048, gated=False)),
    "mpt-3b": _tied(_dense(32, 2560, 20, 20, 10240, 50368, 2048, gated=False)),
    "mpt-7b": _tied(_dense(32, 4096, 32, 32, 16384, 50368, 2048, gated=False)),
    "mpt-13b": _tied(_dense(40, 5120, 40, 40, 20480, 50368, 2048, gated=False)),
    "mpt-30b": _tied(_dense(48, 7168, 56, 56, 28672, 50368, 2048, gated=False)),
    "mpt-70b": _tied(_dense(80, 8192, 64, 64, 32768, 50368, 2048, gated=False)),
    "nemotron-8b": _dense(32, 4096, 32, 32, 16384, 256000, 4096, gated=False),
    "nemotron-15b": _dense(32, 6144, 48, 8, 24576, 256000, 4096, gated=False),
    "nemotron-22b": _dense(40, 6144, 48, 48, 24576, 256000, 4096, gated=False),
    "nemotron-340b": _dense(96, 18432, 96, 8, 73728, 256000, 4096, gated=False),
    "mixtral-8x7b": _experts(_dense(32, 4096, 32, 8, 14336, 32000, 4096), 128, 8, 2, 14336),
    "mixtral-8x22b": _experts(_dense(56, 6144, 48, 8, 16384, 32768, 4096), 128, 8, 2, 16384),
    "dbrx": _experts(_dense(40, 6144, 48, 8, 10752, 100352, 4096), 128, 16, 4, 10752),
    "grok-1": _experts(_dense(64, 6144, 48, 8, 32768, 131072, 8192), 128, 8, 2, 32768),
    "qwen2-57b-a14b": _experts(_dense(28, 3584, 28, 4, 18944, 151936, 4096), 128, 64, 8, 2560, 20480),
    "qwen3-30b-a3b": _experts(_dense(48, 2048, 32, 4, 6144, 151936, 4096), 128, 128, 8, 768),
    "qwen3-235b-a22b": _experts(_dense(94, 4096, 64, 4, 12288, 151936, 4096), 128, 128, 8, 1536),
    "gpt-oss-20b": _experts(_dense(24, 2880, 64, 8, 2880, 201088, 4096), 64, 32, 4, 2880, full=12),
    "gpt-oss-120b": _experts(_dense(36, 2880, 64, 8, 2880, 201088, 4096), 64, 128, 4, 2880, full=18),
    "deepseek-v2-lite": _experts(_dense(27, 2048, 16, 5, 10944, 102400, 4096), 160, 64, 6, 1408, 2816, 1),
    "deepseek-v2": _experts(_dense(60, 5120, 128, 24, 12288, 102400, 4096), 96, 160, 6, 1536, 3072, 1),
    "deepseek-v3": _experts(_dense(61, 7168, 128, 20, 18432, 129280, 4096), 96, 256, 8, 2048, 2048, 3),
    "moonlight-16b-a3b": _experts(_dense(27, 2048, 16, 5, 11264, 163840, 4096), 160, 64, 6, 1408, 2816, 1),
    "kimi-k2": _experts(_dense(61, 7168, 64, 28, 18432, 163840, 4096), 128, 384, 8, 2048, 2048, 1),
    "llama-4-scout": _experts(_dense(48, 5120, 40, 8, 16384, 202048, 8192), 128, 16, 1, 8192, 8192),
    "llama-4-maverick": _experts(_dense(48, 5120, 40, 8, 16384, 202048, 8192), 128, 128, 1, 8192, 8192, dense=24),
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
    (re.compile(r"llama3(\.[123]|[123](?=\d))"), "llama3"),
    (re.compile(r"llama1(?=-?\d)"), "llama"),
    (re.compile(r"llama4e16$"), "llama4scout"),
    (re.compile(r"llama4e128$"), "llama4maverick"),
    (re.compile(r"qwen25(?=\d)"), "qwen2.5"),
    (re.compile(r"nemotronv3"), "nemotron3"),
    (re.compile(r"nemotron4"), "nemotron"),
    (re.compile(r"deepseekr1"), "deepseekv3"),
    (re.compile(r"moe"), ""),
)
"""What of a name is written otherwise, once blanks are gone."""
_ALSO = {
    "nemotron38b": "nemotron8b",
    "nemotron322b": "nemotron22b",
    "nemotron3nano30b": "nemotron3nano",
    "nemotron3nano30ba3b": "nemotron3nano",
    "nemotron3super120b": "nemotron3super",
    "nemotron3super120ba12b": "nemotron3super",
    "deepseekv3671b": "deepseekv3",
    "deepseekv2236b": "deepseekv2",
    "deepseekv216b": "deepseekv2lite",
    "deepseekv2lite16b": "deepseekv2lite",
    "kimik21t": "kimik2",
    "qwen330b": "qwen330ba3b",
    "qwen3235b": "qwen3235ba22b",
    "moonlight16b": "moonlight16ba3b",
    "llama30b": "llama33b",
    "grok1314b": "grok1",
    "dbrx132b": "dbrx",
    "gpt175b": "gpt3175b",
    "bloom": "bloom176b",
}
"""Whole names without blanks, and what they are called here."""
_ANY_OF = re.compile(r"[\s_\-/]+|instruct|chat|pretrain\w*|base$")


def _squeezed(name: str) -> str:
    return _ANY_OF.sub("", name.lower())


_BY_SQUEEZED = {_squeezed(name): model for name, model in MODELS.items()}


def known(name: str) -> ModelSpec | None:
    """The model that a table calls `name`, such as `Llama-3.1-70B` or `Qwen3_235B_a22B (tokendrop)`."""
    plain = _squeezed(name.split("(", maxsplit=1)[0])
    for old, new in _SPELLINGS:
        plain = old.sub(new, plain)
    return _BY_SQUEEZED.get(_ALSO.get(plain, plain))
