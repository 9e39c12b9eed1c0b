"""Many plans at once, as one array per choice: the models of memory and time take all of them in one go."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.types import Mesh, Recomputation

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
RECOMPUTATIONS = (Recomputation.NONE, Recomputation.SELECTIVE, Recomputation.FULL)
"""What the numbers in `Candidates.recomputation` stand for."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Plans of one model on one kind of device; all arrays have the same length."""

    pp: Ints
    interleave: Ints
    """Model chunks per pipeline stage (virtual stages); 1 = plain 1F1B."""
    dp_replicate: Ints
    dp_shard: Ints
    cp: Ints
    tp: Ints
    ep: Ints
    zero: Ints
    """What `dp_shard` divides: 1 optimizer states, 2 gradients too, 3 parameters too; 0 nothing."""
    micro_batch: Ints
    micro_batches: Ints
    """Of the replica with the most samples: k + 1 where others run k."""
    recomputation: Ints
    """Index into `RECOMPUTATIONS`."""
    layers_first: Ints
    """Transformer layers of the first pipeline stage; of the only one where `pp` is 1."""
    layers_middle: Ints
    """Of the fullest stage between the first and the last; 0 where there is none."""
    layers_last: Ints

    def __len__(self) -> int:
        return len(self.pp)

    def take(self, chosen: NDArray[np.intp] | NDArray[np.bool_] | slice) -> Candidates:
        """Those at the positions (or under the mask) `chosen`."""
        return Candidates(*(getattr(self, one.name)[chosen] for one in fields(self)))

    @property
    def devices(self) -> Ints:
        """Devices that each uses."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    def mesh(self, index: int) -> Mesh:
        """The mesh of one."""
        one = (self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp, self.ep)
        return Mesh(*(int(axis[index]) for axis in one))
