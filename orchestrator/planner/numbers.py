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
    """Elementwise operations are compiled or fused into few passes over memory, and collectives overlap products."""
    process_bytes: int = 5 * 1024**3
    """What a process has on a GPU beside tensors, and what fragments: context, libraries, collective buffers."""
    overhead_s: float = 0.0
    """Of each layer and micro-batch, beside the device's: Python, synchronisation."""


SOFTWARE_2022 = Numbers(
    gradient_bytes=2,
    optimizer_bytes=16,
    fused_attention=False,
    sequence_parallel=False,
    fused=False,
    process_bytes=9 * 1024**3,
    overhead_s=6e-3,
)
"""Megatron-DeepSpeed as BLOOM was trained with it: the optimizer's step takes a copy of its gradients in fp32."""
