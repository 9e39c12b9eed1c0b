"""Whether the copies of a tensor that several ranks hold agree: what `replicated` promises and `average` hides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.checkpoint.layout import Box, LogicalTensor
from orchestrator.checkpoint.numbers import numbers
from orchestrator.checkpoint.stream import bands
from orchestrator.checkpoint.view import UniversalView

BLOCK_BYTES = 8 << 20
"""Bytes of one copy in memory at a time."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Copies of one tensor that are not the same bytes."""

    name: str
    copies: int
    """Ranks that hold the tensor."""
    differing: int
    """Elements of all further copies that differ from the first copy's."""
    largest: float
    """Largest absolute difference; infinite where one of two values is not a number."""
    averaged: bool
    """The rule takes their mean: that they differ is expected."""

    def __str__(self) -> str:
        outcome = "their mean is used" if self.averaged else "the first is used"
        gap = f"differ in {self.differing} elements by at most {self.largest:.3g}"
        return f"the {self.copies} copies of {self.name} {gap}: {outcome}"


def disagreements(view: UniversalView, block_bytes: int = BLOCK_BYTES) -> Iterator[Disagreement]:
    """Every tensor of the view whose copies are not all equal, read in blocks; raises what reading raises."""
    for tensor in view.tensors.values():
        if tensor.others:
            found = _compare(view, tensor, block_bytes)
            if found.differing:
                yield found


def _compare(view: UniversalView, tensor: LogicalTensor, block_bytes: int) -> Disagreement:
    differing, largest = 0, 0.0
    whole = Box.whole(tensor.shape)
    for box in bands(whole, max(1, block_bytes // tensor.item_bytes)) if whole.elements else ():
        first, other = (np.empty(box.elements * tensor.item_bytes, np.uint8) for _ in range(2))
        view.read_replica(tensor.name, -1, box, first)
        for index in range(len(tensor.others)):
            view.read_replica(tensor.name, index, box, other)
            if not np.array_equal(first, other):
                count, gap = _measure(numbers(first, tensor.dtype), numbers(other, tensor.dtype))
                differing, largest = differing + count, max(largest, gap)
    return Disagreement(tensor.name, 1 + len(tensor.others), differing, largest, tensor.average)


def _measure(first: Any, second: Any) -> tuple[int, float]:
    """Differing elements and the largest absolute difference; two values that are not numbers are equal."""
    kind = np.complex128 if first.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        unequal = (first != second) & ~(np.isnan(first) & np.isnan(second))
        if not unequal.any():
            return 0, 0.0
        gap = np.abs(first[unequal].astype(kind) - second[unequal].astype(kind))
        gap[np.isnan(gap)] = np.inf
    return int(unequal.sum()), float(gap.max())
