"""Reading manifests from a checkpoint's directory, and the logical tensors that its parts make together."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import open_regular
from orchestrator.checkpoint.layout import Chunk, LogicalTensor
from orchestrator.checkpoint.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    PartEntry,
    PartManifest,
    PartTensor,
    data_name,
    decode_manifest,
    decode_part,
    digest_of,
    parse_directory_name,
    part_name,
)
from orchestrator.checkpoint.root import checkpoint_directory
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint


def load_manifest(root: Path, path: str) -> Manifest:
    """The commit manifest of the checkpoint `path`; raises `CheckpointError` when it is not committed or damaged."""
    file = checkpoint_directory(root, path) / MANIFEST
    try:
        text = _read(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"there is no committed checkpoint {path} in {root}: choose another one") from error
    manifest = decode_manifest(text, _label(file))
    if (manifest.step, manifest.generation) != parse_directory_name(path):
        raise corrupt(
            _label(file),
            f"it belongs to step {manifest.step} of generation {manifest.generation}, so it was moved here",
        )
    return manifest


def load_part(directory: Path, entry: PartEntry, *, step: int, generation: int, world_size: int) -> PartManifest:
    """The part manifest that `entry` stands for, its digest, its place and its data file's size checked."""
    file = directory / part_name(entry.rank)
    text = read_part(directory, entry)
    part = decode_part(text, _label(file))
    if (part.rank, part.step, part.generation, part.world_size) != (entry.rank, step, generation, world_size):
        raise corrupt(
            _label(file),
            f"it belongs to rank {part.rank} of {part.world_size}, step {part.step}, generation {part.generation}",
        )
    if entry.size_bytes != part.file_bytes + len(text):
        raise corrupt(_label(file), f"it describes {part.file_bytes} bytes, not the size that was reported for it")
    require_size(directory / data_name(entry.rank), part)
    return part


def read_part(directory: Path, entry: PartEntry) -> bytes:
    """The bytes of the part manifest that `entry` stands for, its digest checked."""
    file = directory / part_name(entry.rank)
    try:
        text = _read(file)
    except FileNotFoundError as error:
        raise corrupt(_label(file), "it is missing") from error
    if digest_of(text) != entry.digest:
        raise corrupt(_label(file), "its checksum is not the one that was reported for it")
    return text


def require_size(file: Path, part: PartManifest) -> None:
    """Raises `CorruptCheckpoint`, naming the first tensor concerned, unless the data file is as long as it was."""
    try:
        size_bytes = file.stat().st_size
    except FileNotFoundError as error:
        raise corrupt(_label(file), "it is missing", _first_beyond(part, 0)) from error
    except OSError as error:
        raise CheckpointError(f"checkpoint file {file} cannot be read ({error.strerror}): make it readable") from error
    if size_bytes != part.file_bytes:
        raise corrupt(
            _label(file), f"it has {size_bytes} bytes instead of {part.file_bytes}", _first_beyond(part, size_bytes)
        )


def _first_beyond(part: PartManifest, size_bytes: int) -> str | None:
    """The tensor of the first chunk that does not fit into `size_bytes`."""
    beyond = [
        (chunk.begin, tensor.name) for tensor in part.tensors for chunk in tensor.chunks if chunk.end > size_bytes
    ]
    return min(beyond)[1] if beyond else None


def _read(file: Path) -> bytes:
    try:
        with os.fdopen(open_regular(file), "rb") as stream:
            if os.fstat(stream.fileno()).st_size > MAX_MANIFEST_BYTES:
                raise corrupt(_label(file), f"it is larger than {MAX_MANIFEST_BYTES} bytes")
            return stream.read()
    except (FileNotFoundError, NotADirectoryError, CorruptCheckpoint):
        raise
    except OSError as error:
        raise CheckpointError(f"checkpoint file {file} cannot be read ({error.strerror}): make it readable") from error


def _label(file: Path) -> str:
    """How errors name a file: with its checkpoint's directory."""
    return f"{file.parent.name}/{file.name}"


@dataclass(slots=True)
class _Growing:
    """A logical tensor while its parts are read."""

    first: PartTensor
    file: str
    chunks: list[Chunk] = field(default_factory=list)


def merge_parts(directory: Path, parts: Iterable[PartManifest]) -> dict[str, LogicalTensor]:
    """The logical tensors of a checkpoint by name; raises `CorruptCheckpoint` when parts disagree about one."""
    growing: dict[str, _Growing] = {}
    for part in parts:
        data, manifest = data_name(part.rank), f"{directory.name}/{part_name(part.rank)}"
        for tensor in part.tensors:
            known = growing.setdefault(tensor.name, _Growing(tensor, manifest))
            if _identity(known.first) != _identity(tensor):
                raise corrupt(
                    manifest, f"it is a {_words(tensor)} but a {_words(known.first)} in {known.file}", tensor.name
                )
            known.chunks.extend(Chunk(chunk.box, data, chunk.begin, chunk.digest) for chunk in tensor.chunks)
    return {name: _logical(name, one) for name, one in growing.items()}


def _identity(tensor: PartTensor) -> tuple[object, ...]:
    return (tensor.parameter, tensor.state, tensor.kind, tensor.dtype, tensor.shape)


def _words(tensor: PartTensor) -> str:
    return f"{tensor.kind} of {tensor.dtype} {list(tensor.shape)}"


def _logical(name: str, one: _Growing) -> LogicalTensor:
    first = one.first
    return LogicalTensor(name, first.parameter, first.state, first.kind, first.dtype, first.shape, tuple(one.chunks))
