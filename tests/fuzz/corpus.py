"""A tiny checkpoint of every source format, made once, with what is known of it: contents, places, kinds of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.state_dict import get_state_dict

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.formats.universal import write_universal
from orchestrator.checkpoint.layout import ITEM_BYTES, Box, Chunk, row_major
from orchestrator.checkpoint.stream import Limits
from orchestrator.checkpoint.view import UniversalView
from tests.unit.checkpoint import saving
from tests.unit.checkpoint.formats import (
    dcp_saving,
    deepspeed_writer,
    megatron_dist_writer,
    megatron_writer,
    universal_layout,
)
from tests.unit.checkpoint.formats.deepspeed_writer import Layout, model
from tests.unit.checkpoint.formats.test_deepspeed_parallel import Run

SMALL = megatron_writer.Model("llama", layers=1, hidden=4, heads=2, groups=2, ffn=4, vocab=4)


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor as it was saved."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Entry:
    """A whole checkpoint. Nothing changes it: a case copies what it damages."""

    name: str
    directory: Path
    files: Mapping[str, bytes]
    tensors: Mapping[str, Held]
    chunks: Mapping[str, tuple[Chunk, ...]]
    """Where each tensor lies, serialised tensors opened."""
    average: frozenset[str]
    said: Any
    """All that the view says beside its tensors, as JSON."""
    alike: Callable[[str], str | None]
    """Class of a file whose members nothing tells apart: contents exchanged among them stay unnoticed."""
    raw: bool = False
    """The tensors' bytes are under no checksum."""
    unsigned: tuple[str, ...] = ()
    """Files of metadata under no checksum, on whose word alone tensors have their names."""


def _nothing_alike(name: str) -> str | None:
    return None


# ---------------------------------------------------------------- makers


def native(folder: Path) -> Path:
    return folder / saving.save(folder).path


def universal(folder: Path) -> Path:
    view = open_checkpoint(native(folder))
    write_universal(view, folder / "universal", limits=Limits(1 << 20, 1), progress=lambda count: None)
    return folder / "universal"


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "embed.weight": torch.randn(7, 3, generator=generator).bfloat16(),
        "head.weight": torch.randn(4, 5, generator=generator),
        "norm.bias": torch.randn(5, generator=generator),
        "counter": torch.tensor(3),
    }


def safetensors_single(folder: Path) -> Path:
    folder.mkdir()
    save_file(_weights(), folder / "model.safetensors", {"format": "pt"})
    return folder


def safetensors_sharded(folder: Path) -> Path:
    folder.mkdir()
    names = {}
    for index, part in enumerate((["embed.weight", "counter"], ["head.weight"], ["norm.bias"]), 1):
        file = f"model-{index:05d}-of-00003.safetensors"
        save_file({name: _weights()[name] for name in part}, folder / file, {"format": "pt"})
        names |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 150}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def torch_single(folder: Path) -> Path:
    folder.mkdir()
    weights = _weights()
    torch.save({**weights, "tied.weight": weights["embed.weight"]}, folder / "pytorch_model.bin")
    return folder


def _dcp(folder: Path, format: SerializationFormat) -> Path:
    network, optimizer = dcp_saving.trained()
    weights, states = get_state_dict(network, optimizer)
    chosen = {name: weights[name] for name in ("0.weight", "2.weight", "table")}
    state = {name: states["state"][name] for name in ("0.weight", "2.weight")}
    groups = [{**group, "params": [one for one in group["params"] if one in state]} for group in states["param_groups"]]
    writer = dcp.FileSystemWriter(folder, serialization_format=format, thread_count=2)
    return dcp_saving.save({"model": chosen, "optim": {"state": state, "param_groups": groups}}, folder, writer)


def dcp_torch(folder: Path) -> Path:
    return _dcp(folder, SerializationFormat.TORCH_SAVE)


def dcp_safetensors(folder: Path) -> Path:
    return _dcp(folder, SerializationFormat.SAFETENSORS)


def _zero(layout: Layout, dtype: torch.dtype = torch.bfloat16) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        made = model([[("a.weight", (5, 3)), ("a.bias", (3,))], [("scale", (1,))]], dtype=dtype)
        made.buffers["table"] = torch.arange(4)
        made.aliases["tied.weight"] = "a.weight"
        deepspeed_writer.save(folder, made, layout)
        return folder

    return make


def parallel(folder: Path) -> Path:
    Run(stages=2, ranks=2).save(folder, world=1)
    return folder


def _deepspeed_universal(stage: int) -> Callable[[Path], Path]:
    return lambda folder: universal_layout.write(folder, stage=stage, world=2).parent


def _megatron(optimizer: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return megatron_writer.write(megatron_writer.Job(SMALL, tensor=2, optimizer=optimizer), folder).parent

    return make


def megatron_dist(folder: Path) -> Path:
    folder.mkdir()
    return megatron_dist_writer.write(megatron_dist_writer.DistJob(SMALL), folder).parent


def _ranks(name: str) -> str | None:
    """Files of ranks in which no rank is written."""
    kinds = ("optim_states.pt", "model_states.pt", "model_optim_rng.pt", "distrib_optim.pt")
    return next((kind for kind in kinds if name.endswith(kind)), None)


def _values(name: str) -> str | None:
    """Files of DeepSpeed's universal form: a tensor, without its name."""
    return "values" if "/zero/" in name and not name.endswith("optimizer_state.pt") else _ranks(name)


def _distcp(name: str) -> str | None:
    return "data" if name.endswith(".distcp") else None


MAKERS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "native": (native, {}),
    "universal": (universal, {}),
    "safetensors": (safetensors_single, {"raw": True}),
    "safetensors-sharded": (safetensors_sharded, {"raw": True}),
    "torch-bin": (torch_single, {}),
    "dcp": (dcp_torch, {"alike": _distcp, "unsigned": (".metadata",)}),
    "dcp-safetensors": (dcp_safetensors, {"alike": _distcp, "raw": True, "unsigned": (".metadata",)}),
    "zero-1": (_zero(Layout(1, 3)), {}),
    "zero-2": (_zero(Layout(2, 2), torch.float32), {}),
    "zero-bf16": (_zero(Layout(1, 2, "bf16")), {}),
    "zero-3": (_zero(Layout(3, 2)), {"alike": _ranks}),
    "zero-3d": (parallel, {"alike": _ranks}),
    "deepspeed-universal": (_deepspeed_universal(1), {"alike": _values}),
    "deepspeed-universal-3": (_deepspeed_universal(3), {"alike": _values}),
    "megatron": (_megatron("float16"), {"alike": _ranks}),
    "megatron-distributed": (_megatron("distributed"), {"alike": _ranks}),
    "megatron-dist": (megatron_dist, {"alike": _distcp, "unsigned": (".metadata", "metadata.json")}),
}


def make(name: str, folder: Path) -> Entry:
    """The checkpoint of one format, as its own writer makes it."""
    maker, facts = MAKERS[name]
    made = maker(folder)
    directory = folder.parent / f"{folder.name}-whole" / made.name
    directory.parent.mkdir()
    shutil.move(made, directory)  # alone in its parent, so that what escapes from it is seen
    view = open_checkpoint(directory)
    return Entry(
        name,
        directory,
        {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()},
        read_all(view),
        {
            tensor: tuple(_resolved(view, tensor, chunk) for chunk in view.tensors[tensor].chunks)
            for tensor in view.tensors
        },
        frozenset(one.name for one in view.tensors.values() if one.average),
        said(view),
        facts.get("alike", _nothing_alike),
        facts.get("raw", False),
        facts.get("unsigned", ()),
    )


def _resolved(view: UniversalView, name: str, chunk: Chunk) -> Chunk:
    return chunk if chunk.blob_bytes is None else view._resolved(view.tensors[name], chunk)


def read_all(view: UniversalView) -> dict[str, Held]:
    """Every tensor of the view."""
    found = {}
    for name, tensor in view.tensors.items():
        out = bytearray(tensor.size_bytes)
        view.read(name, Box.whole(tensor.shape), out)
        found[name] = Held(tensor.dtype, tensor.shape, bytes(out))
    return found


def said(view: UniversalView) -> Any:
    """What the view says beside its tensors."""
    facts = [view.step, view.state, view.aliases, sorted(view.frozen), view.training_dtypes]
    return json.loads(json.dumps([*facts, {name: one.kind for name, one in view.tensors.items()}]))


def gathered(entry: Entry, files: Mapping[str, bytes]) -> dict[str, Held] | None:
    """The tensors' bytes at their places, from files as they are now; None where a place is gone."""
    found = {}
    for name, held in entry.tensors.items():
        item = ITEM_BYTES[held.dtype]
        whole = np.zeros((*held.shape, item), np.uint8)
        for chunk in entry.chunks[name]:
            data = chunk.data if chunk.data is not None else files.get(chunk.file)
            if data is None:
                return None
            strides = row_major(chunk.box.sizes) if chunk.strides is None else chunk.strides
            reach = 1 + sum((size - 1) * stride for size, stride in zip(chunk.box.sizes, strides, strict=True))
            if not chunk.box.elements:
                continue
            part = np.frombuffer(data, np.uint8)[chunk.begin : chunk.begin + reach * item]
            if len(part) < reach * item:
                return None
            steps = (*(stride * item for stride in strides), 1)
            whole[chunk.box.slices] = np.lib.stride_tricks.as_strided(part, (*chunk.box.sizes, item), steps)
        found[name] = Held(held.dtype, held.shape, whole.tobytes())
    return found
