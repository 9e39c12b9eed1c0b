"""The global gradient norm over the whole mesh with one all-reduce, whatever mix of shardings the gradients have.

torch's own `clip_grad_norm_` stacks the norms of all parameters into one DTensor, which fails as soon as two of them
live on different meshes, and knows nothing of the other pipeline stages. Here every rank sums the squares of its local
shards, each divided by the number of ranks that hold the same shard, and the sums are added up over all ranks:

    norm = sqrt(sum_ranks sum_p |grad_p,local|^2 / copies_p)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from orchestrator.trainer.layouts import Layouts, local_tensor


def _reduced(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient in the parameter's own placements: sequence parallelism leaves partial sums on replicated ones."""
    if isinstance(parameter, DTensor) and parameter.grad.placements != parameter.placements:
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
    return parameter.grad


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[torch.Tensor], max_norm: float, layouts: Layouts, device: torch.device
) -> torch.Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`; returns the norm before that."""
    gradients = [_reduced(parameter) for parameter in parameters if parameter.grad is not None]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients:
        norm = torch.linalg.vector_norm(local_tensor(gradient), dtype=torch.float32)
        total += norm.double().square() / layouts.of(gradient).copies
    dist.all_reduce(total)
    norm = total.sqrt()
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        local_tensor(gradient).mul_(scale.to(gradient.dtype))
    return norm.float()
