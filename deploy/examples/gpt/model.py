"""A small GPT: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

A pipeline stage is the same module with only its own layers (and the embedding or the head at the ends), so that
every parameter keeps its name of the whole model. Initial weights are drawn per name: the same under every mesh.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """Sizes; `heads` is a multiple of `kv_heads`, and tensor parallelism must divide both."""

    layers: int = 4
    hidden: int = 64
    heads: int = 8
    kv_heads: int = 4
    ffn_hidden: int = 192
    vocab: int = 256
    seq_length: int = 32


class RMSNorm(nn.Module):
    """Scale to unit root mean square."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., hidden)."""
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions; x: (batch, heads, sequence, head size), cos and sin: (sequence, head size / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention; the number of local heads follows from the (maybe sharded) projections."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_size = config.hidden // config.heads
        self.wq = nn.Linear(config.hidden, config.heads * self.head_size, bias=False)
        self.wk = nn.Linear(config.hidden, config.kv_heads * self.head_size, bias=False)
        self.wv = nn.Linear(config.hidden, config.kv_heads * self.head_size, bias=False)
        self.wo = nn.Linear(config.heads * self.head_size, config.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: (batch, sequence, hidden)."""
        batch, sequence, _ = x.shape
        q, k, v = (
            projection(x).view(batch, sequence, -1, self.head_size).transpose(1, 2)
            for projection in (self.wq, self.wk, self.wv)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(mixed.transpose(1, 2).reshape(batch, sequence, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden, config.ffn_hidden, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden, config.hidden, bias=False)
        self.w3 = nn.Linear(config.hidden, config.ffn_hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, sequence, hidden)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.recompute_attention = False
        self.attention_norm = RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden)
        self.feed_forward = FeedForward(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: (batch, sequence, hidden)."""
        normed = self.attention_norm(x)
        if self.recompute_attention:
            x = x + checkpoint(self.attention, normed, cos, sin, use_reentrant=False)
        else:
            x = x + self.attention(normed, cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class GPT(nn.Module):
    """The layers `chosen` of the model, with the embedding where they start at 0 and the head where they end."""

    def __init__(self, config: Config, chosen: range | None = None) -> None:
        super().__init__()
        chosen = chosen if chosen is not None else range(config.layers)
        first, last = chosen.start == 0, chosen.stop == config.layers
        self.recompute_layers = False
        self.embedding = nn.Embedding(config.vocab, config.hidden) if first else None
        self.layers = nn.ModuleDict({str(index): Layer(config) for index in chosen})
        self.norm = RMSNorm(config.hidden) if last else None
        self.head = nn.Linear(config.hidden, config.vocab, bias=False) if last else None
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def recompute(self, what: str) -> None:
        """What is computed again in the backward pass: `none`, `selective` (attention) or `full` (every layer)."""
        self.recompute_layers = what == "full"
        for layer in self.layers.values():
            layer.recompute_attention = what == "selective"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: tokens (batch, sequence) or the activations of the stage before; gives activations, or at the end the
        log-probabilities of the next token, (batch, sequence, vocab).
        """
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers.values():
            if self.recompute_layers:
                x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = layer(x, self.cos, self.sin)
        return F.log_softmax(self.head(self.norm(x)), dim=-1) if self.head is not None else x


def rotary_table(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each (sequence, head size / 2)."""
    half = config.hidden // config.heads // 2
    angles = torch.outer(torch.arange(config.seq_length), 10_000.0 ** (-torch.arange(half) / half))
    return angles.cos(), angles.sin()


@torch.no_grad()
def initialise(model: nn.Module, config: Config, seed: int) -> None:
    """Draw every matrix from a generator of its own, seeded by its name; norms keep their ones.

    The standard deviation is `1 / sqrt(hidden)`. The 0.02 that suits wide models would leave a narrow one's attention
    with gradients so close to zero that Adam turns their rounding into whole steps: after 120 steps two meshes would
    differ by 1e-5 in the loss instead of 1e-7.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            depth = 2 * config.layers if name.endswith(("wo.weight", "w2.weight")) else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(config.hidden * depth))
