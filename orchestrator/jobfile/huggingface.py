"""Sizes of a model from its Hugging Face `config.json`: llama-like and gpt2-like decoders, dense or with experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.core.errors import InvalidInput
from orchestrator.core.spec import ModelSpec

_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_EXPERTS = {
    "mixtral": ("num_local_experts", "intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
}
"""Build -> the keys of the number of experts and of the intermediate size of each; all layers have experts."""
_LIMIT_BYTES = 1_000_000


def read_config(path: Path, seq_length: int | None) -> ModelSpec:
    """The model of the `config.json` at `path`; `seq_length` None = the longest the model takes.

    Raises `InvalidInput` for a file that cannot be read and for models of another build.
    """
    config = _read(path)
    kind = config.get("model_type")
    if kind == "gpt2":
        return _gpt2(config, path, seq_length)
    if kind in _LLAMA_LIKE:
        return _llama(config, path, seq_length)
    if kind in _EXPERTS:
        return _experts(config, path, seq_length, *_EXPERTS[kind])
    known = ", ".join((*_LLAMA_LIKE, *_EXPERTS, "gpt2"))
    raise InvalidInput(
        f"{path}: model_type {str(kind)[:60]!r} is not one of {known}; give the sizes in spec.model instead"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_LIMIT_BYTES + 1)
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path} (spec.model.configJson): {error.strerror or error}; check the path"
        ) from error
    if len(content) > _LIMIT_BYTES:
        raise InvalidInput(f"{path}: larger than 1 MB, which no config.json is; check spec.model.configJson")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not JSON ({error}); check spec.model.configJson") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"{path}: not a Hugging Face config.json (no mapping); check spec.model.configJson")
    return config


def _size(config: dict[str, Any], path: Path, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise InvalidInput(f"{path}: {key} is missing; add it, or give the sizes in spec.model instead")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1_000_000_000:
        raise InvalidInput(f"{path}: {key} must be a whole number of at least 1, not {str(value)[:60]}")
    return value


def _llama(config: dict[str, Any], path: Path, seq_length: int | None) -> ModelSpec:
    hidden, heads = _size(config, path, "hidden_size"), _size(config, path, "num_attention_heads")
    head = hidden // heads if config.get("head_dim") is None else _size(config, path, "head_dim")
    return ModelSpec(
        layers=_size(config, path, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_size(config, path, "num_key_value_heads", heads),
        ffn_hidden=_size(config, path, "intermediate_size"),
        vocab=_size(config, path, "vocab_size"),
        seq_length=seq_length or _size(config, path, "max_position_embeddings"),
        tied_embeddings=config.get("tie_word_embeddings") is True,
        head_size=None if head * heads == hidden else head,
    )


def _experts(config: dict[str, Any], path: Path, seq_length: int | None, number: str, width: str) -> ModelSpec:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise InvalidInput(f"{path}: some layers have no experts; give the sizes in spec.model instead")
    return replace(
        _llama(config, path, seq_length),
        experts=_size(config, path, number),
        experts_per_token=_size(config, path, "num_experts_per_tok"),
        expert_hidden=_size(config, path, width),
    )


def _gpt2(config: dict[str, Any], path: Path, seq_length: int | None) -> ModelSpec:
    hidden, heads = _size(config, path, "n_embd"), _size(config, path, "n_head")
    return ModelSpec(
        layers=_size(config, path, "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        ffn_hidden=_size(config, path, "n_inner", 4 * hidden),
        vocab=_size(config, path, "vocab_size"),
        seq_length=seq_length or _size(config, path, "n_positions"),
        tied_embeddings=config.get("tie_word_embeddings", True) is True,
        gated_ffn=False,
    )
