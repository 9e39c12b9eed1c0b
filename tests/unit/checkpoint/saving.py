"""Small checkpoints for tests: arrays in, files out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.checkpoint import store
from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.layout import Box, Piece
from orchestrator.core.types import SaveReport

NAMES = {"float64": "F64", "float32": "F32", "uint16": "BF16", "int64": "I64", "uint8": "U8", "bool": "BOOL"}
WEIGHT = np.arange(48, dtype=np.float32).reshape(8, 6)
MOMENT = -WEIGHT
STEP = np.array(40, dtype=np.float32)
BUFFER = np.arange(5, dtype=np.uint16)


def piece(parameter: str, array: Any, box: Box | None = None, *, state: str | None = None, kind: str = "") -> Piece:
    """The `box` (all by default) of a whole tensor's `array`; uint16 stands for BF16."""
    box = box or Box.whole(array.shape)
    data = np.ascontiguousarray(array[(*box.slices, ...)]).reshape(-1).view(np.uint8)
    kind = kind or ("state" if state else "parameter")
    return Piece(parameter, state, kind, NAMES[array.dtype.name], array.shape, box, memoryview(data))


def rows(rank: int, world_size: int) -> Box:
    """Rank's rows of `WEIGHT`."""
    first, last = 8 * rank // world_size, 8 * (rank + 1) // world_size
    return Box((first, 0), (last - first, 6))


def write_rank(
    root: Path, rank: int, world_size: int = 2, *, step: int = 40, generation: int = 3, sign: int = 1
) -> SaveReport:
    """Rank's rows of a weight and a moment; rank 0 also holds a scalar state and a buffer.

    `sign` -1 gives other contents of the same size.
    """
    box = rows(rank, world_size)
    pieces = [piece("w", (WEIGHT + step) * np.float32(sign), box), piece("w", MOMENT, box, state="exp_avg")]
    if rank == 0:
        pieces += [piece("w", STEP, state="step"), piece("b", BUFFER, kind="buffer")]
    state = {"param_groups": [{"lr": 0.5, "params": ["w"]}], "sampler": {"rank": rank}}
    return native.write_part(
        root,
        generation=generation,
        step=step,
        rank=rank,
        world_size=world_size,
        pieces=pieces,
        state=state,
        stall_s=0.25,
    )


def write_all(root: Path, world_size: int = 2, *, step: int = 40, generation: int = 3) -> list[SaveReport]:
    """The parts of all ranks, uncommitted."""
    return [write_rank(root, rank, world_size, step=step, generation=generation) for rank in range(world_size)]


def commit(root: Path, parts: list[SaveReport]) -> store.Committed:
    """The commit that these reports ask for."""
    return store.commit(root, generation=parts[0].generation, step=parts[0].step, world_size=len(parts), parts=parts)


def save(root: Path, world_size: int = 2, *, step: int = 40, generation: int = 3) -> store.Committed:
    """A committed checkpoint."""
    return commit(root, write_all(root, world_size, step=step, generation=generation))
