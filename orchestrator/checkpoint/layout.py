"""What a checkpoint is made of, whatever wrote it: boxes of logical tensors, backed by byte ranges of files. Pure."""

from __future__ import annotations

import math
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
    """A box of a tensor in a file: the row-major elements from byte `begin` on."""

    box: Box
    file: str
    """Path relative to the checkpoint's directory."""
    begin: int
    digest: str | None = None
    """xxh3-128 (hex) of its bytes; None where the format keeps none."""


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """One whole tensor as a list of chunks, which may repeat a box (replicas) but never overlap in part."""

    name: str
    parameter: str
    state: str | None
    kind: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes per element."""
        return ITEM_BYTES[self.dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes
