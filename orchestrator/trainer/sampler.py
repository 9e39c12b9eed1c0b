"""Which samples a global batch holds: a stateless function of (seed, step), the same under every mesh.

Position `p = step * global_batch + i` of the job's endless sample stream lies in epoch `p // N`, at place `p % N` of
that epoch's permutation of the dataset's `N` samples. The permutation is a keyed Feistel network on the smallest even
number of bits that holds `N`, walked along its cycle until it lands below `N`: a bijection that needs O(1) memory per
index and no state, so that a restart, a resize or a change of mesh can neither lose nor repeat a sample.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.types import BatchSplit

ROUNDS = 6
Indices = NDArray[np.uint64]


def _mix(values: Indices) -> Indices:
    """The finalizer of splitmix64: every input bit changes about half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A pseudo-random bijection of `range(size)` that depends on `seed` and `epoch` alone."""

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, not {size}")
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype=np.uint64)

    def _encrypt(self, values: Indices) -> Indices:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The elements at `positions` (each in `range(size)`)."""
        values = self._encrypt(positions.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Sampler:
    """The job's sample stream over a dataset of `size` samples in global batches of `global_batch`."""

    size: int
    global_batch: int
    seed: int

    def samples(self, step: int, offset: int, count: int) -> tuple[int, ...]:
        """Dataset indices at places `offset .. offset + count - 1` of the global batch of the 0-based `step`."""
        positions = np.arange(count, dtype=np.int64) + (step * self.global_batch + offset)
        epochs = positions // self.size
        chosen = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            chosen[inside] = Permutation(self.size, self.seed, int(epoch))(positions[inside] % self.size)
        return tuple(chosen.tolist())

    def replica(self, step: int, split: BatchSplit, replica: int) -> tuple[int, ...]:
        """Dataset indices that data-parallel `replica` consumes in `step`."""
        return self.samples(step, split.offset(replica), split.samples[replica])

    def steps(self, epochs: float) -> int:
        """Whole global batches in `epochs` passes over the dataset."""
        return int(epochs * self.size) // self.global_batch
