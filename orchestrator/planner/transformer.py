"""Counts of a decoder-only transformer: parameters, and floating-point operations of the forward pass per token."""

from __future__ import annotations

from orchestrator.core.spec import ModelSpec


def head_size(model: ModelSpec) -> int:
    """Numbers per attention head."""
    return model.head_size or model.hidden // model.heads


def query_size(model: ModelSpec) -> int:
    """Numbers of all query heads of a token."""
    return model.heads * head_size(model)


def key_value_size(model: ModelSpec) -> int:
    """Numbers of all keys of a token; the values have as many."""
    return model.kv_heads * head_size(model)


def matrices(model: ModelSpec) -> int:
    """Products of a feed-forward block: three where it is gated."""
    return 3 if model.gated_ffn else 2


def expert_layers(model: ModelSpec) -> int:
    """Layers with experts."""
    return model.layers - model.dense_layers if model.experts else 0


def attention_parameters(model: ModelSpec) -> int:
    """Query, key, value and output projections of one layer, and its two norms."""
    return 2 * model.hidden * (query_size(model) + key_value_size(model)) + 2 * model.hidden


def feed_forward_parameters(model: ModelSpec) -> int:
    """The feed-forward block of a layer without experts."""
    return matrices(model) * model.hidden * model.ffn_hidden


def expert_input(model: ModelSpec) -> int:
    """Numbers of a token that go to a routed expert."""
    return model.expert_input or model.hidden


def expert_parameters(model: ModelSpec) -> int:
    """One expert of one layer."""
    return matrices(model) * expert_input(model) * model.expert_hidden


def shared_parameters(model: ModelSpec) -> int:
    """What every token of a layer with experts passes besides: router, shared experts, the way to a smaller size."""
    smaller = 2 * (model.expert_input or 0)
    return model.hidden * (model.experts + smaller + matrices(model) * model.shared_hidden)


def layer_parameters(model: ModelSpec) -> float:
    """Weights of one layer, experts included: of the mean layer, where some have experts and some have none."""
    with_experts = expert_layers(model) / model.layers
    experts = shared_parameters(model) + model.experts * expert_parameters(model)
    feed_forward = (1 - with_experts) * feed_forward_parameters(model) + with_experts * experts
    return attention_parameters(model) + feed_forward


def active_parameters(model: ModelSpec) -> float:
    """Weights of the mean layer that one token meets."""
    with_experts = expert_layers(model) / model.layers
    experts = shared_parameters(model) + model.experts_per_token * expert_parameters(model)
    feed_forward = (1 - with_experts) * feed_forward_parameters(model) + with_experts * experts
    return attention_parameters(model) + feed_forward


def vocabulary_parameters(model: ModelSpec) -> int:
    """Weights of the embedding; the output projection has as many unless it is tied to it."""
    return model.vocab * model.hidden


def parameters(model: ModelSpec) -> float:
    """All weights."""
    vocabularies = 1 if model.tied_embeddings else 2
    return model.layers * layer_parameters(model) + vocabularies * vocabulary_parameters(model)


def attention_share(model: ModelSpec) -> float:
    """Share of the layers whose attention sees every earlier token; what windows see is counted as nothing."""
    return 1.0 if model.full_attention_layers is None else model.full_attention_layers / model.layers


def attention_flops(model: ModelSpec) -> float:
    """Scores and weighted sum of the mean layer per token, causal: half of 2 products of 2 operations each."""
    return 2 * model.seq_length * query_size(model) * attention_share(model)


def layer_flops(model: ModelSpec) -> float:
    """The mean layer per token: two operations per weight that it meets, and attention."""
    return 2 * active_parameters(model) + attention_flops(model)


def output_flops(model: ModelSpec) -> int:
    """Output projection per token."""
    return 2 * vocabulary_parameters(model)


def model_flops(model: ModelSpec) -> float:
    """Forward and backward pass per token, nothing recomputed: what MFU counts (arXiv:2204.02311, appendix B)."""
    return 3 * (model.layers * layer_flops(model) + output_flops(model))


def split_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers per pipeline stage, as even as possible; the earlier stages take what is left over.

    The last stage also computes the output projection and the loss, so it is never the one with a layer more.
    """
    base, extra = divmod(layers, stages)
    return tuple(base + (stage < extra) for stage in range(stages))
