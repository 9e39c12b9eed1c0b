"""Counts of a decoder-only transformer: parameters, and floating-point operations of the forward pass per token."""

from __future__ import annotations

from orchestrator.core.spec import ModelSpec


def layer_parameters(model: ModelSpec) -> int:
    """Weights of one layer: query, key, value and output projections, feed-forward, two norms."""
    key_value = model.hidden * model.kv_heads // model.heads
    attention = 2 * model.hidden * model.hidden + 2 * model.hidden * key_value
    return attention + (3 if model.gated_ffn else 2) * model.hidden * model.ffn_hidden + 2 * model.hidden


def vocabulary_parameters(model: ModelSpec) -> int:
    """Weights of the embedding; the output projection has as many unless it is tied to it."""
    return model.vocab * model.hidden


def parameters(model: ModelSpec) -> int:
    """All weights."""
    vocabularies = 1 if model.tied_embeddings else 2
    return model.layers * layer_parameters(model) + vocabularies * vocabulary_parameters(model)


def attention_flops(model: ModelSpec) -> int:
    """Scores and weighted sum of one layer per token, causal: half of 2 products of 2 operations each."""
    return 2 * model.seq_length * model.hidden


def layer_flops(model: ModelSpec) -> int:
    """One layer per token: two operations per weight, and attention."""
    return 2 * layer_parameters(model) + attention_flops(model)


def output_flops(model: ModelSpec) -> int:
    """Output projection per token."""
    return 2 * vocabulary_parameters(model)


def split_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers per pipeline stage, as even as possible; the earlier stages take what is left over.

    The last stage also computes the output projection and the loss, so it is never the one with a layer more.
    """
    base, extra = divmod(layers, stages)
    return tuple(base + (stage < extra) for stage in range(stages))
