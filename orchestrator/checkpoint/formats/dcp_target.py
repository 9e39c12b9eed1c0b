"""Any view as a PyTorch distributed checkpoint, for stock `torch.distributed.checkpoint.load`.

model.<parameter>                      weights (the fp32 master where there is one), buffers, tied names too
optim.state.<parameter>.<state>        moments and steps
optim.param_groups.<group>.<setting>   as `get_optimizer_state_dict` names them
<key>...                               scheduler and other plain state
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.formats.dcp_keys import KeyPath
from orchestrator.checkpoint.formats.dcp_metadata import METADATA
from orchestrator.checkpoint.formats.torch_blob import ALIGNMENT, tensor_blob
from orchestrator.checkpoint.layout import Box, LogicalTensor
from orchestrator.checkpoint.stream import Limits, OutputFile, Progress, Segment, cut
from orchestrator.checkpoint.target import partial
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

NEUTRAL: dict[str, Any] = {
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
    "maximize": False,
}
"""How torch's optimizers do their work, where a source does not say: as they would by themselves."""
FILE_BYTES = 4 << 30
"""A data file is not begun anew before it has this size."""
CHUNK_BYTES = 64 << 20
"""torch reads a chunk whole whatever it needs of it: so chunks are not much larger than a rank's share of a tensor."""


def write_dcp(view: UniversalView, target: Path, *, limits: Limits, progress: Progress) -> None:
    """Write `view` to the new folder `target`, streamed; it has its name only once it is whole.

    Raises `Conflict` when the target exists, `CheckpointError` and `CorruptCheckpoint` as reading and writing do.
    """
    layout = _lay_out(view)
    outputs = [file.output() for file in layout.files]
    metadata = layout.metadata()
    with partial(target) as folder:
        folder.fill(view, outputs, layout.plan(), limits, progress)
        folder.put(METADATA, metadata)
        folder.publish()


@dataclass(slots=True)
class _DataFile:
    """A `.distcp` file as it is laid out."""

    name: str
    size_bytes: int = 0
    literals: list[tuple[int, bytes]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def add(self, data: bytes) -> None:
        self.literals.append((self.size_bytes, data))
        self.size_bytes += len(data)

    def align(self) -> None:
        self.add(b"\0" * (-self.size_bytes % ALIGNMENT))

    def output(self) -> OutputFile:
        return OutputFile(self.name, self.size_bytes, tuple(self.literals), tuple(self.segments))


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a value lies: of a tensor, one of its boxes."""

    key: str
    box: Box | None
    file: str
    begin: int
    size_bytes: int


class _Layout:
    """What goes where."""

    def __init__(self) -> None:
        self.files: list[_DataFile] = []
        self.entries: list[_Entry] = []
        self.tensors: dict[str, LogicalTensor] = {}
        self.paths: dict[str, KeyPath] = {}

    def _file(self) -> _DataFile:
        if not self.files or self.files[-1].size_bytes >= FILE_BYTES:
            self.files.append(_DataFile(f"__0_{len(self.files)}.distcp"))
        return self.files[-1]

    def add_value(self, path: KeyPath, value: Any) -> None:
        import torch

        key = self._claim(path)
        stream = io.BytesIO()
        torch.save(value, stream)
        file = self._file()
        self.entries.append(_Entry(key, None, file.name, file.size_bytes, len(stream.getvalue())))
        file.add(stream.getvalue())

    def add_tensor(self, path: KeyPath, tensor: LogicalTensor) -> None:
        key = self._claim(path)
        self.tensors[key] = tensor
        if not tensor.size_bytes:
            return
        for segment in cut(tensor.name, Box.whole(tensor.shape), tensor.dtype, 0, CHUNK_BYTES):
            file = self._file()
            file.align()
            begin = file.size_bytes
            before, after = tensor_blob(tensor.dtype, segment.box.sizes)
            file.add(before)
            file.segments.append(Segment(tensor.name, segment.box, tensor.dtype, file.size_bytes))
            file.size_bytes += segment.size_bytes
            file.add(after)
            self.entries.append(_Entry(key, segment.box, file.name, begin, file.size_bytes - begin))

    def _claim(self, path: KeyPath) -> str:
        key = ".".join(map(str, path))
        if key in self.paths:
            raise CheckpointError(f"two entries would both be {key} in a distributed checkpoint: rename one")
        self.paths[key] = path
        return key

    def plan(self) -> Any:
        """All that decides about the bytes of the files."""
        return [[file.name, [(at, data.hex()) for at, data in file.literals]] for file in self.files]

    def metadata(self) -> bytes:
        """`.metadata`, as torch pickles it."""
        import torch
        from torch.distributed.checkpoint import metadata as dcp
        from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

        described: dict[str, Any] = {}
        for key, tensor in self.tensors.items():
            properties = dcp.TensorProperties(dtype=torch_dtype(tensor.dtype))
            described[key] = dcp.TensorStorageMetadata(properties, torch.Size(tensor.shape), [])
            if not tensor.size_bytes:
                whole = Box.whole(tensor.shape)
                described[key].chunks.append(_chunk(whole))
        storage = {}
        for entry in self.entries:
            place = _StorageInfo(entry.file, entry.begin, entry.size_bytes)
            if entry.box is None:
                described[entry.key] = dcp.BytesStorageMetadata()
                storage[dcp.MetadataIndex(entry.key)] = place
            else:
                chunks = described[entry.key].chunks
                storage[dcp.MetadataIndex(entry.key, torch.Size(entry.box.offsets), len(chunks))] = place
                chunks.append(_chunk(entry.box))
        whole = dcp.Metadata(described, dict(self.paths), storage, dcp.StorageMeta(), CURRENT_DCP_VERSION)
        return pickle.dumps(whole)


def torch_dtype(dtype: str) -> Any:
    """The dtype in torch of a name of safetensors."""
    import torch

    from orchestrator.checkpoint.archive import TORCH_DTYPES

    return getattr(torch, next(name for name, known in TORCH_DTYPES.items() if known == dtype))


def _chunk(box: Box) -> Any:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def _lay_out(view: UniversalView) -> _Layout:
    layout = _Layout()
    for path, value in (*values(view), *_neutral_settings(view)):
        layout.add_value(path, value)
    for path, name in tensors(view):
        layout.add_tensor(path, view.tensors[name])
    return layout


def tensors(view: UniversalView) -> Iterator[tuple[KeyPath, str]]:
    """(path in the state dict, name in the view) of every tensor, a tied one under each of its names."""
    for tensor in view.tensors.values():
        if tensor.state is None:
            yield ("model", tensor.name), tensor.name
    for alias, name in view.aliases.items():
        if name in view.tensors:
            yield ("model", alias), name
    for tensor in view.tensors.values():
        if tensor.state is not None:
            yield ("optim", "state", tensor.parameter, tensor.state), tensor.name


def values(view: UniversalView) -> Iterator[tuple[KeyPath, Any]]:
    """(path in the state dict, value) of hyper-parameters and other plain state."""
    for index, group in enumerate(view.state.get("param_groups", [])):
        for key, value in group.items():
            yield ("optim", "param_groups", index, key), as_torch(key, value)
    rest = {key: value for key, value in view.state.items() if key != "param_groups"}
    yield from flatten(rest)


def _neutral_settings(view: UniversalView) -> Iterator[tuple[KeyPath, Any]]:
    """Settings that torch's optimizers ask for and the source does not know, with the values that change nothing."""
    states = {tensor.state for tensor in view.tensors.values()}
    neutral = NEUTRAL | ({"amsgrad": False} if "exp_avg_sq" in states and "max_exp_avg_sq" not in states else {})
    for index, group in enumerate(view.state.get("param_groups", [])):
        for key, value in neutral.items():
            if key not in group:
                yield ("optim", "param_groups", index, key), value


def as_torch(setting: str, value: Any) -> Any:
    """A hyper-parameter as torch's optimizers hold it: JSON has no tuples."""
    return tuple(value) if setting == "betas" and isinstance(value, list) else value


def flatten(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Leaves of nested state as torch's planner sees them: lists are opened only where they hold mappings."""
    if isinstance(value, dict):
        for key, member in value.items():
            yield from flatten(member, (*path, str(key)))
    elif isinstance(value, list) and not _terminal(value):
        for index, member in enumerate(value):
            yield from flatten(member, (*path, index))
    else:
        yield path, value


def _terminal(value: Any) -> bool:
    if isinstance(value, dict):
        return False
    return not isinstance(value, list) or all(not isinstance(one, dict | list) or _terminal(one) for one in value)
