"""The native format against doing only what cannot be avoided: `python -m tests.bench.checkpoint.native [MiB] [DIR]`.

Peers are measured in the same run, turn about: a plain write + fsync of the same bytes for saving, `safetensors`
reading a file of the same tensors for loading, xxh3 over memory for verifying. Prints JSON; `ratio` is ours /
peer, by medians.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import safe_open

from orchestrator.checkpoint import store
from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.layout import Box, Piece
from orchestrator.checkpoint.verify import verify

TENSORS = 64
ROUNDS = 5


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(ours: Callable[[int], object], peer: Callable[[int], object], size_bytes: int) -> dict[str, float]:
    """Medians of rounds taken in turn; GB/s and the ratio of the times."""
    pairs = [(seconds(lambda n=n: ours(n)), seconds(lambda n=n: peer(n))) for n in range(ROUNDS)]  # type: ignore[misc]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "ours_gb_per_s": round(size_bytes / mine / 1e9, 2),
        "peer_gb_per_s": round(size_bytes / theirs / 1e9, 2),
        "ratio": round(mine / theirs, 2),
    }


def plain_write(path: Path, arrays: list[Any]) -> None:
    with path.open("wb") as file:
        for array in arrays:
            file.write(memoryview(array).cast("B"))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def measure(folder: Path, size_bytes: int) -> dict[str, Any]:
    """All comparisons on `size_bytes` of float32 in `TENSORS` tensors."""
    rows = size_bytes // (TENSORS * 1024 * 4)
    generator = np.random.default_rng(0)
    arrays = [generator.random((rows, 1024), np.float32) for _ in range(TENSORS)]
    shape = (rows, 1024)
    pieces = [
        Piece(f"w{index}", None, "parameter", "F32", shape, Box.whole(shape), memoryview(array).cast("B"))
        for index, array in enumerate(arrays)
    ]
    total = sum(array.nbytes for array in arrays)

    def write(step: int) -> Any:
        return native.write_part(
            folder, generation=1, step=step, rank=0, world_size=1, pieces=pieces, state={}, stall_s=0.0
        )

    saving = compare(write, lambda _: plain_write(folder / "plain", arrays), total)
    done = store.commit(folder, generation=1, step=ROUNDS, world_size=1, parts=[write(ROUNDS)])
    out = np.empty(shape, np.float32)
    half = np.empty((rows, 512), np.float32)

    def read(_: int) -> None:
        view = native.open_view(folder, done.path)
        for name in view.tensors:
            view.read(name, Box.whole(shape), out)

    def read_columns(_: int) -> None:
        view = native.open_view(folder, done.path)
        for name in view.tensors:
            view.read(name, Box((0, 512), (rows, 512)), half)

    def peer_read(_: int) -> None:
        with safe_open(folder / done.path / "part-00000.safetensors", "numpy") as file:
            for index in range(TENSORS):
                np.copyto(out, file.get_tensor(f"w{index}@0,0"))

    def peer_columns(_: int) -> None:
        with safe_open(folder / done.path / "part-00000.safetensors", "numpy") as file:
            for index in range(TENSORS):
                np.copyto(half, file.get_slice(f"w{index}@0,0")[:, 512:])

    return {
        "bytes": total,
        "save": saving,
        "load_whole": compare(read, peer_read, total),
        "load_half_the_columns": compare(read_columns, peer_columns, total // 2),
        "verify": compare(
            lambda _: verify(folder, done.path),
            lambda _: [xxhash.xxh3_128_hexdigest(piece.data) for piece in pieces],
            total,
        ),
    }


def main() -> None:
    """Arguments: MiB of data (256), a folder on the disk to measure (that of temporary files)."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        print(json.dumps(measure(Path(folder), mib << 20), indent=2))


if __name__ == "__main__":
    main()
