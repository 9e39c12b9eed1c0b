"""What a checkpoint is made of, whatever wrote it: boxes of logical tensors, backed by byte ranges of files. Pure."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
"""Safetensors' names of dtypes -> bytes per element: all that is ever known of a dtype here."""

KINDS = ("parameter", "buffer", "state")
"""What a logical tensor can be; `state` is an optimizer's state of a parameter."""

MAX_DIMENSIONS = 64
"""As many as numpy and torch allow."""


@dataclass(frozen=True, slots=True)
class Box:
    """The elements `offsets[d] <= index[d] < offsets[d] + sizes[d]` of a tensor; of a scalar, `Box((), ())`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """All of a tensor of this shape."""
        return cls((0,) * len(shape), shape)

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))

    def inside(self, shape: tuple[int, ...]) -> bool:
        """Whether it is a box of a tensor of this shape."""
        return len(self.offsets) == len(self.sizes) == len(shape) and all(
            start >= 0 and size >= 0 and start + size <= extent
            for start, size, extent in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def relative_to(self, origin: tuple[int, ...]) -> Box:
        """The same elements counted from `origin`."""
        return Box(tuple(start - base for start, base in zip(self.offsets, origin, strict=True)), self.sizes)

    def shifted(self, origin: tuple[int, ...]) -> Box:
        """The same box counted from where `origin` is `(0, ...)`: the inverse of `relative_to`."""
        return Box(tuple(start + base for start, base in zip(self.offsets, origin, strict=True)), self.sizes)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{part.start}:{part.stop}" for part in self.slices) + "]"


def tensor_name(parameter: str, state: str | None) -> str:
    """`P`, or `P.<state>` for an optimizer state of the parameter `P`."""
    return parameter if state is None else f"{parameter}.{state}"


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor in memory, about to be saved."""

    parameter: str
    """Name of the parameter or buffer in the whole model."""
    state: str | None
    """Name of an optimizer state; None = the value itself."""
    kind: str
    """One of `KINDS`."""
    dtype: str
    """A key of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    """Shape of the whole logical tensor."""
    box: Box
    data: memoryview
    """The bytes of the box, C-contiguous."""

    @property
    def name(self) -> str:
        """Name of the logical tensor."""
        return tensor_name(self.parameter, self.state)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor in a file: its elements from byte `begin` on, row-major unless `strides` says otherwise."""

    box: Box
    file: str
    """Path relative to the checkpoint's directory; empty when `data` holds the bytes."""
    begin: int
    digest: str | None = None
    """xxh3-128 (hex) of its bytes; None where the format keeps none."""
    strides: tuple[int, ...] | None = None
    """Elements from one index to the next along each dimension; None = row-major without gaps."""
    blob_bytes: int | None = None
    """The chunk is inside a serialised tensor (a `torch.save` archive or a safetensors file) of so many bytes that
    starts at `begin`; that is opened when the chunk is first read."""
    blob_shape: tuple[int, ...] | None = None
    """Shape of that serialised tensor where the chunk is not all of it, or has another shape. The tensor must then be
    row-major, and the chunk's elements (with `strides`) begin `blob_skip` elements after its first."""
    blob_skip: int = 0
    data: bytes | None = None
    """The elements themselves, for a few values that the source keeps among its metadata."""

    def moved(self, box: Box) -> Chunk:
        """The same bytes at another place of the tensor (as many elements per dimension)."""
        # Not `replace`, which takes three times as long: a view may have a hundred thousand chunks.
        return Chunk(
            box,
            self.file,
            self.begin,
            self.digest,
            self.strides,
            self.blob_bytes,
            self.blob_shape,
            self.blob_skip,
            self.data,
        )


class LazyChunks(Sequence[Chunk]):
    """Chunks of one tensor that are made when asked for: where there are a million, a reader needs few."""

    __slots__ = ()

    @abstractmethod
    def touching(self, wanted: Box) -> Iterable[Chunk]:
        """Those that share an element with `wanted`, which is not empty, in order."""

    @abstractmethod
    def flaw(self, shape: tuple[int, ...]) -> str | None:
        """Why they do not hold every element of a tensor of this shape exactly once, as `reshard.flaw` says it."""


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """One whole tensor as a sequence of chunks, which may repeat a box (replicas) but never overlap in part."""

    name: str
    parameter: str
    state: str | None
    kind: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Sequence[Chunk]
    others: tuple[Sequence[Chunk], ...] = ()
    """Further copies of the whole tensor, from ranks that hold it too."""
    average: bool = False
    """The tensor is the mean of `chunks` and all `others`; otherwise `others` should equal `chunks`."""
    rule: str | None = None
    """What the rule that merged it from several ranks' pieces says, in words; None where it was stored as one."""

    @property
    def item_bytes(self) -> int:
        """Bytes per element."""
        return ITEM_BYTES[self.dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes


def row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor without gaps."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def is_row_major(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements with these strides follow one another without gaps (strides of extent 1 do not matter)."""
    step = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def flat_boxes(shape: tuple[int, ...], start: int, count: int) -> list[tuple[int, Box]]:
    """Elements `start .. start + count` of the flattened row-major tensor as boxes, at most 2n - 1 of them.

    Each comes with the number of elements before it in the range: within a box the flat order is the box's own
    row-major order, so a box is contiguous wherever the range is.
    """
    if count == 0:
        return []
    if not shape:
        return [(0, Box((), ()))]
    inner = math.prod(shape[1:])
    first, skip = divmod(start, inner)
    last, tail = divmod(start + count, inner)
    rest = shape[1:]
    if first == last:  # within one row
        return [(at, _in_row(first, box)) for at, box in flat_boxes(rest, skip, count)]
    found: list[tuple[int, Box]] = []
    if skip:
        found += [(at, _in_row(first, box)) for at, box in flat_boxes(rest, skip, inner - skip)]
        first += 1
    if first < last:
        found.append((first * inner - start, Box((first, *(0,) * len(rest)), (last - first, *rest))))
    if tail:
        found += [(last * inner - start + at, _in_row(last, box)) for at, box in flat_boxes(rest, 0, tail)]
    return found


def _in_row(row: int, box: Box) -> Box:
    return Box((row, *box.offsets), (1, *box.sizes))
