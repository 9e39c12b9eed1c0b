"""How a job computes, as far as the models of time and memory need to know it."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "fp4")


@dataclass(frozen=True, slots=True)
class Numbers:
    """Types of numbers, and what the software does. The defaults are those of our trainer and of today's frameworks."""

    precision: str = "bf16"
    """Of matrix products: one of `PRECISIONS`. Below 16 bits, weights and activations keep 16."""
    gradient_bytes: int = 4
    """Per parameter, as summed over micro-batches and ranks."""
    optimizer_bytes: int = 12
    """Master weight and two moments of Adam in fp32."""
    fused_attention: bool = True
    """Scores are never in memory (FlashAttention)."""
    sequence_parallel: bool = True
    """Activations between the parallel products are divided over `tp`, too (arXiv:2205.05198)."""
    frozen: bool = False
    """Only small adapters are trained (LoRA): no gradients, states or weight products of the model itself."""
    fused: bool = True
    """Elementwise operations are compiled or fused into few passes over memory."""
