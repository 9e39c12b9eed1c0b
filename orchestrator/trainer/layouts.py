"""Where this rank's chunk of a tensor lies, and which ranks hold the same chunk: from placements, without a collective.

A DTensor's chunk is fixed by the rank's coordinates on the mesh axes that shard it; every other axis (except `pp`,
whose ranks hold different layers) repeats it. A plain tensor is whole and repeated on every axis except `pp`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from orchestrator.checkpoint.layout import Box
from orchestrator.core.errors import InvalidInput
from orchestrator.core.types import AXES, Mesh


@dataclass(frozen=True, slots=True)
class Layout:
    """The local chunk: `copies` ranks hold the same one, and this rank is number `index` of them."""

    box: Box
    copies: int
    index: int

    def owns(self, name: str) -> bool:
        """Whether this copy is the one that is saved: a stable choice by name spreads the work over the copies."""
        return zlib.crc32(name.encode()) % self.copies == self.index


class Layouts:
    """Layouts of tensors as seen from `rank` of the session's mesh; each kind is worked out once."""

    def __init__(self, sizes: Mesh, rank: int) -> None:
        self._sizes = dict(zip(AXES, sizes.sizes, strict=True))
        self._coordinates = [sizes.coordinate(other) for other in range(sizes.world_size)]
        self._coordinate = self._coordinates[rank]
        self._known: dict[Any, Layout] = {}

    def of(self, tensor: torch.Tensor) -> Layout:
        """Layout of the local chunk of `tensor`; raises `InvalidInput` for one that is yet to be reduced."""
        distributed = isinstance(tensor, DTensor)
        key = (tensor.device_mesh, tensor.placements, tensor.shape) if distributed else tensor.shape
        if key not in self._known:
            self._known[key] = self._of_dtensor(tensor) if distributed else self._of_plain(tensor)
        return self._known[key]

    def _of_plain(self, tensor: torch.Tensor) -> Layout:
        return self._layout(Box.whole(tuple(tensor.shape)), set())

    def _of_dtensor(self, tensor: DTensor) -> Layout:
        sharding: set[str] = set()
        for dim, placement in enumerate(tensor.placements):
            if placement.is_partial():
                raise InvalidInput(f"a tensor placed as {tensor.placements} holds partial sums: reduce it first")
            if not isinstance(placement, Replicate):
                sharding |= self._extent(tensor.device_mesh, dim)
        (chunk,) = tensor.__create_chunk_list__()
        return self._layout(Box(tuple(chunk.offsets), tuple(chunk.sizes)), sharding)

    def _layout(self, box: Box, sharding: set[str]) -> Layout:
        copies, index = 1, 0
        for axis, size in self._sizes.items():
            if axis != "pp" and axis not in sharding:
                copies, index = copies * size, index * size + self._coordinate[axis]
        return Layout(box, copies, index)

    def _extent(self, mesh: DeviceMesh, dim: int) -> set[str]:
        """Axes of the session's mesh along which dimension `dim` of `mesh` (a slice, maybe flattened) extends."""
        position = mesh.get_coordinate()
        assert position is not None, "this rank must be part of the tensor's mesh"
        line = mesh.mesh[tuple(slice(None) if other == dim else at for other, at in enumerate(position))]
        coordinates = [self._coordinates[rank] for rank in line.tolist()]
        return {axis for axis in AXES if len({coordinate[axis] for coordinate in coordinates}) > 1}


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` that is on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
