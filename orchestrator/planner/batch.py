"""How a global batch is divided over replicas and micro-batches."""

from __future__ import annotations

from orchestrator.core.types import BatchSplit


def split(global_batch: int, replicas: int, micro_batch: int) -> BatchSplit:
    """K or k+1 samples per replica, all kept: 512 over 7 replicas is 74 + 6 x 73."""
    base, extra = divmod(global_batch, replicas)
    samples = tuple(base + (replica < extra) for replica in range(replicas))
    return BatchSplit(global_batch, micro_batch, -(-samples[0] // micro_batch), samples)


def micro_batches(samples: int, stages: int, wanted: int | None) -> list[tuple[int, int]]:
    """(size, number) of micro-batches worth trying for the replica with the most `samples`; fewest first.

    `wanted` fixes the size. A pipeline is offered at least as many micro-batches as stages where there are samples
    for it: its bubble is (stages - 1) / (number + stages - 1) of the step. The last is
    the one that needs least memory.
    """
    if wanted is not None:
        sizes = [min(wanted, samples)]
    elif stages == 1:
        sizes = [-(-samples // 2**power) for power in range(samples.bit_length())] + [1]
    else:
        sizes = [max(1, samples // (stages * factor)) for factor in (1, 2, 4, 8)] + [1]
    return [(size, -(-samples // size)) for size in sorted(set(sizes), reverse=True)]
