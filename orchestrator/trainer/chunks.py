"""Tensors as bytes: the local chunk of a logical tensor as a `Piece` on the way out, filled in place on the way in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from orchestrator.checkpoint.layout import Box, Piece
from orchestrator.core.errors import CheckpointError
from orchestrator.trainer.layouts import Layouts, local_tensor
from orchestrator.trainer.state import Entry

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' names of dtypes."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64
"""Bytes: chunks start on cache lines, and at a multiple of every item size."""


@dataclass(frozen=True, slots=True)
class LocalChunk:
    """The local part of one logical tensor that this rank saves, and where it lies in the snapshot."""

    entry: Entry
    box: Box
    source: torch.Tensor
    start: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the box."""
        return self.source.numel() * self.source.element_size()


def chunks(entries: Iterator[Entry], layouts: Layouts) -> list[LocalChunk]:
    """What this rank saves: its own boxes, and of repeated boxes those that fall to it."""
    chosen: list[LocalChunk] = []
    start = 0
    for entry in entries:
        if entry.tensor.dtype not in NAMES:
            raise CheckpointError(f"{entry.name} has dtype {entry.tensor.dtype}, which no checkpoint format here holds")
        local = local_tensor(entry.tensor)
        layout = layouts.of(entry.tensor)
        if layout.box.sizes != tuple(local.shape):
            raise CheckpointError(
                f"the local part of {entry.name} has shape {tuple(local.shape)} but its placements say "
                f"{layout.box.sizes}: report this"
            )
        if local.numel() == 0 or not layout.owns(entry.name):
            continue
        chunk = LocalChunk(entry, layout.box, local, start)
        chosen.append(chunk)
        start += -(-chunk.size_bytes // ALIGNMENT) * ALIGNMENT
    return chosen


class Snapshot:
    """A host buffer that is allocated and touched once and then reused by every save."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size_bytes: int) -> None:
        """Make room; touches every page, so that `copy` runs at memory speed."""
        if self._buffer.numel() < size_bytes:
            self._buffer = torch.zeros(size_bytes, dtype=torch.uint8)
            self._buffer.fill_(1)  # zeros come as untouched pages

    def copy(self, chosen: list[LocalChunk]) -> list[Piece]:
        """Copy the chunks into the buffer; the pieces stay valid until the next copy."""
        end = chosen[-1].start + chosen[-1].size_bytes if chosen else 0
        self.reserve(end)
        pieces = []
        for chunk in chosen:
            window = self._buffer[chunk.start : chunk.start + chunk.size_bytes]
            window.view(chunk.source.dtype).view(chunk.source.shape).copy_(chunk.source, non_blocking=True)
            pieces.append(_piece(chunk, memoryview(window.numpy())))
        if any(chunk.source.is_cuda for chunk in chosen):
            torch.cuda.synchronize()
        return pieces


def _piece(chunk: LocalChunk, data: memoryview) -> Piece:
    entry = chunk.entry
    return Piece(
        parameter=entry.parameter,
        state=entry.state,
        kind=entry.kind,
        dtype=NAMES[entry.tensor.dtype],
        shape=tuple(entry.tensor.shape),
        box=chunk.box,
        data=data,
    )


def writable_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def empty_box(box: Box, dtype: str) -> torch.Tensor:
    """A host tensor that holds `box`."""
    return torch.empty(math.prod(box.sizes), dtype=DTYPES[dtype]).reshape(box.sizes)
