"""The chunks of a whole checkpoint as columns of numbers; each becomes an object when somebody asks for it.

With 3,000 tensors over 512 ranks there are 1.5 million chunks, of which a rank that restores needs a few thousand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, overload

import numpy as np

from orchestrator.checkpoint.layout import Box, Chunk, LazyChunks
from orchestrator.checkpoint.reshard import flaw
from orchestrator.checkpoint.rows import Column, Rows

DIGEST_BYTES = 16
"""Of an xxh3-128 checksum."""
BoxKey: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes: a box as a key, without the time that making a `Box` takes."""


class Boxes:
    """Numbered boxes of any numbers of dimensions; none is empty where a checkpoint's chunks are in them."""

    __slots__ = ("offsets", "sizes")

    def __init__(self, offsets: Rows, sizes: Rows) -> None:
        self.offsets, self.sizes = offsets, sizes

    @classmethod
    def of(cls, keys: Iterable[BoxKey]) -> Boxes:
        """These boxes, in order."""
        listed = list(keys)
        return cls(Rows([offsets for offsets, _ in listed]), Rows([sizes for _, sizes in listed]))

    def __getitem__(self, number: int) -> Box:
        return Box(tuple(self.offsets.lists[number]), tuple(self.sizes.lists[number]))

    def keys(self) -> Iterator[BoxKey]:
        """Every box, in order."""
        return zip(map(tuple, self.offsets.lists), map(tuple, self.sizes.lists), strict=True)

    def taken(self, numbers: Column, dimensions: int) -> tuple[Column, Column]:
        """Offsets and sizes (one row per box) of boxes that have so many dimensions."""
        return self.offsets.taken(numbers, dimensions), self.sizes.taken(numbers, dimensions)


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """A checkpoint's chunks, tensor by tensor, each tensor's in the order of their parts.

    Invariant: `boxes` are distinct, so that equal numbers are replicas and different numbers are not; each has an
    element and lies inside its tensor.
    """

    boxes: Boxes
    box: Column
    """Number of the chunk's box."""
    part: Column
    """Number of the chunk's part, and of its file."""
    begin: Column
    source: Column
    """Where the chunk's digest stands in `digests`."""
    files: Sequence[str]
    digests: bytes
    _flaws: dict[tuple[tuple[int, ...], bytes], str | None] = field(default_factory=dict)
    """What was found of a shape that is divided into these boxes: most tensors are divided as others are."""

    def chunk(self, at: int) -> Chunk:
        """The chunk of this place."""
        first = int(self.source[at]) * DIGEST_BYTES
        digest = self.digests[first : first + DIGEST_BYTES].hex()
        return Chunk(self.boxes[int(self.box[at])], self.files[int(self.part[at])], int(self.begin[at]), digest)

    def flaw(self, shape: tuple[int, ...], first: int, last: int) -> str | None:
        """As `reshard.flaw`, of the chunks `first .. last`."""
        numbers = self.box[first:last]
        key = (shape, numbers.tobytes())
        if key not in self._flaws:
            whole = _is_whole(shape, *self.boxes.taken(np.unique(numbers), len(shape)))
            self._flaws[key] = None if whole else flaw(shape, (self.boxes[number] for number in numbers.tolist()))
        return self._flaws[key]


class ColumnChunks(LazyChunks):
    """The chunks `first .. last` of the columns: those of one tensor."""

    __slots__ = ("_columns", "_dimensions", "_first", "_last")

    def __init__(self, columns: Columns, dimensions: int, first: int, last: int) -> None:
        self._columns, self._dimensions, self._first, self._last = columns, dimensions, first, last

    def __len__(self) -> int:
        return self._last - self._first

    @overload
    def __getitem__(self, at: int) -> Chunk: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[Chunk, ...]: ...

    def __getitem__(self, at: int | slice) -> Chunk | tuple[Chunk, ...]:
        found = range(self._first, self._last)[at]
        return self._columns.chunk(found) if isinstance(found, int) else tuple(map(self._columns.chunk, found))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def touching(self, wanted: Box) -> Iterator[Chunk]:
        """As `LazyChunks.touching`; raises `ValueError` for a box of another number of dimensions."""
        if len(wanted.offsets) != self._dimensions:
            raise ValueError(f"{wanted} is no box of a tensor of {self._dimensions} dimensions")
        offsets, sizes = self._columns.boxes.taken(self._columns.box[self._first : self._last], self._dimensions)
        start = np.array(wanted.offsets, np.int64)
        end = start + np.array(wanted.sizes, np.int64)
        shared = ((offsets < end) & (start < offsets + sizes)).all(axis=1)
        for at in np.flatnonzero(shared).tolist():
            yield self._columns.chunk(self._first + at)

    def flaw(self, shape: tuple[int, ...]) -> str | None:
        """As `reshard.flaw`, found once for all tensors that are divided alike."""
        return self._columns.flaw(shape, self._first, self._last)


def _is_whole(shape: tuple[int, ...], offsets: Column, sizes: Column) -> bool:
    """Whether distinct boxes are surely a partition of the tensor: one box that is all of it, or a division along one
    dimension. False says nothing.
    """
    cut = np.flatnonzero(((offsets != 0) | (sizes != np.array(shape, np.int64))).any(axis=0))
    if cut.size != 1:
        return cut.size == 0 and len(offsets) == 1
    order = np.argsort(offsets[:, cut[0]])
    start = offsets[order, cut[0]]
    end = start + sizes[order, cut[0]]
    return bool(start[0] == 0 and end[-1] == shape[cut[0]] and (start[1:] == end[:-1]).all())
