"""Which ranks hold the same chunk of a tensor, derived from its placements alone, without a collective.

A DTensor's chunk is fixed by the rank's coordinates on the mesh axes that shard it; every other axis (except `pp`,
whose ranks hold different layers) repeats it. A plain tensor is repeated on every axis except `pp`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from orchestrator.core.errors import InvalidInput
from orchestrator.core.types import AXES, Mesh


@dataclass(frozen=True, slots=True)
class Copies:
    """`copies` ranks hold the same chunk; this rank is number `index` of them."""

    copies: int
    index: int

    def owns(self, name: str) -> bool:
        """Whether this copy is the one that is saved: a stable choice by name spreads the work over the copies."""
        return zlib.crc32(name.encode()) % self.copies == self.index


class Replication:
    """Copies of tensors on `mesh`, as seen from `rank`."""

    def __init__(self, mesh: DeviceMesh, sizes: Mesh, rank: int) -> None:
        self.mesh = mesh
        self._sizes = dict(zip(AXES, sizes.sizes, strict=True))
        self._coordinate = sizes.coordinate(rank)
        self._coordinate_of = sizes.coordinate
        self._rank = rank
        self._known: dict[tuple[DeviceMesh, tuple[int, ...]], frozenset[str]] = {}

    def of(self, tensor: torch.Tensor) -> Copies:
        """Copies of the local chunk of `tensor`."""
        sharding = self._sharding_axes(tensor) if isinstance(tensor, DTensor) else frozenset()
        copies, index = 1, 0
        for axis, size in self._sizes.items():
            if axis != "pp" and axis not in sharding:
                copies, index = copies * size, index * size + self._coordinate[axis]
        return Copies(copies, index)

    def _sharding_axes(self, tensor: DTensor) -> frozenset[str]:
        dims = tuple(dim for dim, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate))
        if any(tensor.placements[dim].is_partial() for dim in dims):
            raise InvalidInput(
                f"a tensor with placements {tensor.placements} is not reduced: reduce it before the step"
            )
        key = (tensor.device_mesh, dims)
        if key not in self._known:
            self._known[key] = frozenset(axis for dim in dims for axis in self._varying(tensor.device_mesh, dim))
        return self._known[key]

    def _varying(self, mesh: DeviceMesh, dim: int) -> set[str]:
        """Axes of the session's mesh along which dimension `dim` of `mesh` (a slice, maybe flattened) extends."""
        position = mesh.get_coordinate()
        assert position is not None, "this rank must be part of the tensor's mesh"
        line = mesh.mesh[tuple(slice(None) if other == dim else at for other, at in enumerate(position))]
        coordinates = [self._coordinate_of(rank) for rank in line.tolist()]
        return {axis for axis in AXES if len({coordinate[axis] for coordinate in coordinates}) > 1}


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` that is on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of the local chunk in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(chunk.offsets), tuple(chunk.sizes)
