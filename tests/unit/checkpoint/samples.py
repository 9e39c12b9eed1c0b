"""Views of small made-up checkpoints, held in one raw file, for tests of what is done with a view."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.layout import Box, Chunk, LogicalTensor
from orchestrator.checkpoint.view import UniversalView

ARRAYS: dict[str, Any] = {
    "layers.0.weight": np.random.default_rng(1).normal(size=(37, 11)).astype("f4"),
    "layers.0.weight.exp_avg": np.random.default_rng(2).normal(size=(37, 11)).astype("f4"),
    "layers.0.weight.exp_avg_sq": np.random.default_rng(3).random(size=(37, 11)).astype("f4"),
    "layers.0.weight.step": np.array(12, "f4"),
    "embedding": np.random.default_rng(4).normal(size=(5, 3, 2)).astype("f8"),
    "frozen": np.arange(7, dtype="f4"),
    "counter": np.array(3, "i8"),
    "nothing": np.zeros((0, 4), "f4"),
}
BUFFERS = ("counter", "nothing")
DTYPES = {"f4": "F32", "f8": "F64", "i8": "I64"}
GROUPS = [{"lr": 0.5, "betas": [0.9, 0.95], "params": ["layers.0.weight"]}, {"lr": 0.1, "params": ["embedding"]}]


def sample(directory: Path, arrays: dict[str, Any] = ARRAYS, pieces: int = 3) -> UniversalView:
    """A view of the arrays, each stored as `pieces` bands of rows in the file `raw`."""
    directory.mkdir(exist_ok=True)
    data, tensors = bytearray(), {}
    for name, array in arrays.items():
        chunks = []
        for box in _bands(array.shape, pieces):
            chunks.append(Chunk(box, "raw", len(data)))
            data += array[box.slices].tobytes()
        parameter, _, state = name.rpartition(".") if name.count(".") > 2 or name.endswith("step") else (name, "", "")
        kind = "state" if state else "buffer" if name in BUFFERS else "parameter"
        dtype = DTYPES[array.dtype.str[1:]]
        tensors[name] = LogicalTensor(name, parameter, state or None, kind, dtype, array.shape, tuple(chunks))
    (directory / "raw").write_bytes(data)
    return UniversalView(
        LocalFiles(directory),
        step=12,
        generation=0,
        state={"param_groups": GROUPS, "lr_scheduler": {"last_epoch": 12}},
        tensors=tensors,
        source="sample",
        aliases={"tied": "embedding"} if "embedding" in tensors else {},
        frozen=["frozen"] if "frozen" in tensors else [],
        training_dtypes={"layers.0.weight": "BF16"},
    )


def _bands(shape: tuple[int, ...], pieces: int) -> list[Box]:
    if not shape or shape[0] < pieces:
        return [Box.whole(shape)]
    edges = [shape[0] * index // pieces for index in range(pieces + 1)]
    rest = shape[1:]
    return [Box((start, *(0,) * len(rest)), (end - start, *rest)) for start, end in itertools.pairwise(edges)]


def contents(view: UniversalView) -> dict[str, bytes]:
    """The bytes of every tensor."""
    found = {}
    for name, tensor in view.tensors.items():
        out = bytearray(tensor.size_bytes)
        view.read(name, Box.whole(tensor.shape), out)
        found[name] = bytes(out)
    return found
