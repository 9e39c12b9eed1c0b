"""Checkpoints of Megatron-LM's `torch_dist` format, written from their published description: it needs GPUs itself.

Sources (github.com/NVIDIA/Megatron-LM, in `megatron/core`): `dist_checkpointing/strategies/torch.py` (the grid of
flattened cells, `mcore_data`), `dist_checkpointing/optimizer.py` (keys of optimizer states),
`transformer/transformer_block.py` (layers stacked along a prepended dimension), `transformer/mlp.py` (SwiGLU as two
tensors under one key). The pickles are made of PyTorch's own metadata classes.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.unit.checkpoint.formats.megatron_writer import Model


@dataclass
class Saver:
    """Gathers entries as ranks would write them, and writes the folder."""

    folder: Path
    data: bytearray = field(default_factory=bytearray)
    tensors: dict[str, Any] = field(default_factory=dict)
    places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    mcore: dict[str, dict[str, Any]] = field(default_factory=dict)

    def chunk(self, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], piece: torch.Tensor) -> None:
        entry = self.tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=piece.dtype), torch.Size(shape), [])
        )
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
        self._put(MetadataIndex(key, torch.Size(offsets)), piece.clone())

    def blob(self, key: str, value: Any) -> None:
        self.tensors[key] = BytesStorageMetadata()
        self._put(MetadataIndex(key), value)

    def _put(self, index: MetadataIndex, value: Any) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        self.places[index] = _StorageInfo("__0_0.distcp", len(self.data), buffer.tell())
        self.data += buffer.getvalue()

    def write(self, common: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True)
        metadata = Metadata(self.tensors, None, self.places)
        metadata.mcore_data = self.mcore  # type: ignore[attr-defined]
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))
        (self.folder / "__0_0.distcp").write_bytes(self.data)
        (self.folder / "metadata.json").write_text(
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"})
        )
        torch.save(common, self.folder / "common.pt")


@dataclass
class DistJob:
    """How the model was trained and saved."""

    model: Model
    tensor: int = 1
    data: int = 1
    """Data-parallel ranks that divide the optimizer states; 1 = each state is saved in the parameter's chunks."""
    stacked: bool = True
    dtype: torch.dtype = torch.bfloat16
    chained: bool = False
    optimizer: bool = True

    def state(self, name: str, state: str) -> torch.Tensor:
        """A whole state."""
        whole = self.model.tensors[name]
        return {"fp32_param": whole, "exp_avg": whole * 0.5 - 1, "exp_avg_sq": whole**2}[state].float()


def write(job: DistJob, root: Path, iteration: int = 100) -> Path:
    """Write the checkpoint; returns its folder."""
    saver = Saver(root / f"iter_{iteration:07d}")
    for name, whole in job.model.tensors.items():
        _add(saver, job, name, "", whole.to(job.dtype), flatten=False)
        for state in ("fp32_param", "exp_avg", "exp_avg_sq") if job.optimizer else ():
            prefix = ("chained_0." if job.chained else "") + f"optimizer.state.{state}."
            _add(saver, job, name, prefix, job.state(name, state), flatten=job.data > 1)
    saver.blob("decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4", [b"x"])
    saver.blob("rng_state/shard_0_1", [{"a": 1}])
    saver.write(_common(job, iteration))
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return saver.folder


def _add(saver: Saver, job: DistJob, name: str, prefix: str, whole: torch.Tensor, flatten: bool) -> None:
    cells = _fragmentation(job, name, whole)
    key, lead = name, []
    if job.stacked and ".layers." in name:
        head, rest = name.split(".layers.")
        number, tail = rest.split(".", 1)
        key, lead = f"{head}.layers.{tail}", [(int(number), job.model.layers)]
    key = prefix + key
    cell = tuple(size // count for size, count in zip(whole.shape, cells, strict=True))
    for at in itertools.product(*map(range, cells)):
        start = tuple(index * size for index, size in zip(at, cell, strict=True))
        piece = whole[tuple(slice(a, a + size) for a, size in zip(start, cell, strict=True))]
        first = tuple(number for number, _ in lead)
        total = tuple(count for _, count in lead)
        if not flatten:
            saver.chunk(key, (*total, *whole.shape), (*first, *start), piece[(None,) * len(lead)])
            continue
        flat = piece.flatten()
        grid = (*total, *cells, flat.numel())
        saver.mcore[key] = {"nd_reformulated_orig_global_shape": (*total, *whole.shape)}
        edges = [flat.numel() * rank // job.data + (1 if 0 < rank < job.data else 0) for rank in range(job.data + 1)]
        for low, high in itertools.pairwise(edges):
            part = flat[low:high].reshape((1,) * (len(grid) - 1) + (-1,))
            saver.chunk(key, grid, (*first, *at, low), part)


def _fragmentation(job: DistJob, name: str, whole: torch.Tensor) -> tuple[int, ...]:
    """Into how many chunks a parameter is divided along each dimension."""
    owner, _, last = name.rpartition(".")
    module = owner.rpartition(".")[2]
    rows = {"linear_qkv": job.tensor, "word_embeddings": job.tensor, "output_layer": job.tensor}
    rows["linear_fc1"] = job.tensor * (1 if job.model.kind == "gpt" else 2)
    if module in ("linear_proj", "linear_fc2") and last == "weight":
        return (1, job.tensor)
    return (rows.get(module, 1), *(1,) * (whole.ndim - 1))


def _common(job: DistJob, iteration: int) -> dict[str, Any]:
    model = job.model
    groups = [
        {"wd_mult": decay, "lr_mult": 1.0, "is_expert_parallel": False, "lr": 0.01, "params": [0, 1]}
        for decay in (1.0, 0.0)
    ]
    inner = {"param_groups": groups, "state": {"common_step": torch.tensor(7.0)}}
    args = Namespace(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        swiglu=model.kind != "gpt",
        num_experts=model.experts or None,
    )
    common: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": iteration}
    if job.optimizer:
        common["optimizer"] = {0: {"optimizer": inner}} if job.chained else {"optimizer": inner}
    return common
