"""How a global batch is divided over replicas and micro-batches."""

from __future__ import annotations

from orchestrator.core.types import BatchSplit


def split(global_batch: int, replicas: int, micro_batch: int) -> BatchSplit:
    """K or k+1 samples per replica, all kept: 512 over 7 replicas is 74 + 6 x 73."""
    base, extra = divmod(global_batch, replicas)
    samples = tuple(base + (replica < extra) for replica in range(replicas))
    return BatchSplit(global_batch, micro_batch, -(-samples[0] // micro_batch), samples)
