"""Reading manifests from a checkpoint's folder, and the logical tensors that its parts make together.

The folder may be a directory or lie in an object store; its name is the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.checkpoint.fields import corrupt, naming
from orchestrator.checkpoint.files import Files, folder_name, read_whole
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
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint


def load_manifest(files: Files) -> Manifest:
    """The commit manifest in a checkpoint's folder; raises `CheckpointError` when it is not committed or damaged."""
    try:
        text = read_whole(files, MANIFEST, MAX_MANIFEST_BYTES)
    except CorruptCheckpoint as error:
        if not _is_missing(error):
            raise
        raise CheckpointError(f"there is no committed checkpoint at {files.location}: choose another one") from error
    manifest = decode_manifest(text, files.label(MANIFEST))
    if (manifest.step, manifest.generation) != parse_directory_name(folder_name(files)):
        raise corrupt(
            files.label(MANIFEST),
            f"it belongs to step {manifest.step} of generation {manifest.generation}, so it was moved here",
        )
    return manifest


def load_parts(files: Files, manifest: Manifest) -> list[PartManifest]:
    """All part manifests that a commit names, each checked as `load_part` does."""
    step, generation, ranks = manifest.step, manifest.generation, len(manifest.parts)
    return [load_part(files, one, step=step, generation=generation, world_size=ranks) for one in manifest.parts]


def load_part(files: Files, entry: PartEntry, *, step: int, generation: int, world_size: int) -> PartManifest:
    """The part manifest that `entry` stands for, its digest, its place and its data file's size checked."""
    label = files.label(part_name(entry.rank))
    text = read_part(files, entry)
    part = decode_part(text, label)
    if (part.rank, part.step, part.generation, part.world_size) != (entry.rank, step, generation, world_size):
        raise corrupt(
            label,
            f"it belongs to rank {part.rank} of {part.world_size}, step {part.step}, generation {part.generation}",
        )
    if entry.size_bytes != part.file_bytes + len(text):
        raise corrupt(label, f"it describes {part.file_bytes} bytes, not the size that was reported for it")
    _require_size(files, part)
    return part


def read_part(files: Files, entry: PartEntry) -> bytes:
    """The bytes of the part manifest that `entry` stands for, its digest checked."""
    text = read_whole(files, part_name(entry.rank), MAX_MANIFEST_BYTES)
    if digest_of(text) != entry.digest:
        raise corrupt(files.label(part_name(entry.rank)), "its checksum is not the one that was reported for it")
    return text


def _require_size(files: Files, part: PartManifest) -> None:
    """Raises `CorruptCheckpoint`, naming the first tensor concerned, unless the data file is as long as it was."""
    file = data_name(part.rank)
    try:
        size_bytes = files.size(file)
    except CorruptCheckpoint as error:
        if (first := _first_beyond(part, 0)) is None:
            raise
        raise naming(error, first) from error
    if size_bytes != part.file_bytes:
        reason = f"it has {size_bytes} bytes instead of {part.file_bytes}"
        raise corrupt(files.label(file), reason, _first_beyond(part, size_bytes))


def _first_beyond(part: PartManifest, size_bytes: int) -> str | None:
    """The tensor of the first chunk that does not fit into `size_bytes`."""
    beyond = [
        (chunk.begin, tensor.name) for tensor in part.tensors for chunk in tensor.chunks if chunk.end > size_bytes
    ]
    return min(beyond)[1] if beyond else None


def _is_missing(error: CorruptCheckpoint) -> bool:
    return isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)


@dataclass(slots=True)
class _Growing:
    """A logical tensor while its parts are read."""

    first: PartTensor
    file: str
    chunks: list[Chunk] = field(default_factory=list)


def merge_parts(name: str, parts: Iterable[PartManifest]) -> dict[str, LogicalTensor]:
    """The logical tensors of the checkpoint `name`; raises `CorruptCheckpoint` when parts disagree about one."""
    growing: dict[str, _Growing] = {}
    for part in parts:
        data, manifest = data_name(part.rank), f"{name}/{part_name(part.rank)}"
        for tensor in part.tensors:
            known = growing.setdefault(tensor.name, _Growing(tensor, manifest))
            if _identity(known.first) != _identity(tensor):
                raise corrupt(
                    manifest, f"it is a {_words(tensor)} but a {_words(known.first)} in {known.file}", tensor.name
                )
            known.chunks.extend(Chunk(chunk.box, data, chunk.begin, chunk.digest) for chunk in tensor.chunks)
    return {key: _logical(key, one) for key, one in growing.items()}


def _identity(tensor: PartTensor) -> tuple[object, ...]:
    return (tensor.parameter, tensor.state, tensor.kind, tensor.dtype, tensor.shape)


def _words(tensor: PartTensor) -> str:
    return f"{tensor.kind} of {tensor.dtype} {list(tensor.shape)}"


def _logical(name: str, one: _Growing) -> LogicalTensor:
    first = one.first
    return LogicalTensor(name, first.parameter, first.state, first.kind, first.dtype, first.shape, tuple(one.chunks))
