"""How a job computes, as far as the models of time and memory need to know it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import numpy as np

from orchestrator.planner.candidates import Ints

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
    overlapped: bool = True
    """Collectives of data-parallel ranks run beside computing."""
    process_bytes: int = 5 * 1024**3
    """What a process has on a GPU beside tensors, and what fragments: context, libraries, collective buffers."""
    overhead_s: float = 0.0
    """Of each layer and micro-batch, beside the device's: Python, synchronisation."""
    attention: float = 0.39
    """Of the highest measured 16-bit rate: the products of fused attention, forward and backward."""
    attention_limit: float = inf
    """Operations per second that its kernels reach on any device: those made for an older generation."""
    stops_early: bool = True
    """Recomputation is torch's: it ends once the backward pass has what it needs, and selective recomputation keeps
    attention and some products instead of doing attention again."""
    tensor_overlap: float = 0.3
    """Share of the collectives of `tp` and `cp` that hides behind products."""
    narrow: float = 1.0
    """Rate of products below 16 bits, relative to those with one scale per tensor."""
    all_reduced: bool = False
    """Gradients are averaged on all ranks before each keeps its share, which moves them twice."""
    experts_divided: bool = True
    """`tp` divides experts, too; else each is whole, and `ep` counts the ranks of `tp`."""
    routing_s: float = 2.7e-3
    """What the host needs at least for a layer with experts, forward: it waits for counts of tokens, and launches."""
    expert_s: float = 0.0
    """Of each expert on a device, forward: its products and casts are launched one by one."""
    grouped: float = 0.85
    """Rate of the products of several experts, relative to that of one."""
    scanned: float = 20.0
    """Passes through memory of the queries of a layer whose attention does not see all: a window, or a state-space scan
    of five kernels and a convolution."""
    in_order: bool = False
    """Tokens are dealt to experts in turn, as benchmarks do: those of a token are neighbours."""
    fused_experts: bool = False
    """Gated experts in fp8 do products, activation and casts in one kernel."""
    expert_overlap: float = 0.0
    """Share of what `ep` sends that hides behind another micro-batch in an interleaved pipeline."""
    narrow_inputs: bool = False
    """Inputs of products below 16 bits are kept in 8 bits for the backward pass."""
    logit_bytes: int = 10
    """What the loss keeps per logit, beside the logit in the working type: in fp32 and the gradient in both types."""

    @property
    def narrows(self) -> bool:
        """Whether products run below 16 bits."""
        return self.precision in ("fp8", "fp4")

    def expert_tensor(self, tp: Ints) -> Ints:
        """By how many ranks of `tp` an expert is divided."""
        return tp if self.experts_divided else np.ones_like(tp)


SOFTWARE_2022 = Numbers(
    gradient_bytes=2,
    optimizer_bytes=16,
    fused_attention=False,
    sequence_parallel=False,
    fused=False,
    overlapped=False,
    process_bytes=9 * 1024**3,
    overhead_s=6e-3,
    stops_early=False,
    tensor_overlap=0.0,
    all_reduced=True,
)
"""Megatron-DeepSpeed as BLOOM was trained with it: the optimizer's step takes a copy of its gradients in fp32."""

MEGATRON = Numbers(
    gradient_bytes=2,
    attention=0.54,
    stops_early=False,
    tensor_overlap=0.6,
    experts_divided=False,
    expert_s=5e-5,
    grouped=0.5,
    scanned=90.0,
    expert_overlap=0.5,
    narrow_inputs=True,
    logit_bytes=4,
)
"""Megatron-LM and what NVIDIA builds on it, as its performance tables run it: gradients in 16 bits, the collectives of
`tp` in chunks beside the products, attention of cuDNN."""

MEGATRON_2022 = replace(
    MEGATRON,
    optimizer_bytes=16,
    fused_attention=False,
    sequence_parallel=False,
    overlapped=False,
    tensor_overlap=0.0,
    all_reduced=True,
)
"""Megatron-LM before FlashAttention (arXiv:2104.04473; 2205.05198 adds `sequence_parallel`)."""

COMPOSER = replace(Numbers(), attention_limit=1.7e14, logit_bytes=2)
"""MosaicML's Composer of 2023: FSDP, attention kernels that know nothing of Hopper, a loss computed in place."""

AUTOMODEL = replace(
    Numbers(),
    gradient_bytes=2,
    optimizer_bytes=4,
    attention=MEGATRON.attention,
    in_order=True,
    logit_bytes=2,
)
"""NeMo AutoModel as its performance tables run it: FSDP2, all states in 16 bits, attention of cuDNN, a gate that deals
tokens out in turn."""
