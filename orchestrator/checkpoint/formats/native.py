"""regrow's own format: each rank writes its chunks as one safetensors file beside a part manifest.

Keys of the safetensors file are `<tensor>@<offsets>`, for example `layers.0.wq.weight@0,16`.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.durable import locked, sync_directory, temporary, write_synced
from orchestrator.checkpoint.files import Files, LocalFiles, folder_name
from orchestrator.checkpoint.formats import Reading
from orchestrator.checkpoint.heap import uncollected
from orchestrator.checkpoint.layout import ITEM_BYTES, KINDS, Piece
from orchestrator.checkpoint.location import files_at
from orchestrator.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    PartManifest,
    data_name,
    digest_of,
    directory_name,
    encode_part,
    merge_states,
    parse_directory_name,
    part_name,
)
from orchestrator.checkpoint.part_tensors import PartChunk, PartTensor, PartTensors
from orchestrator.checkpoint.parts import load_manifest, load_parts, merge_parts
from orchestrator.checkpoint.root import checkpoint_directory, create_root, parse_root, require_space
from orchestrator.checkpoint.store import require_fence
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError, Refused
from orchestrator.core.types import SaveReport

__all__ = ["NAME", "UniversalView", "open_files", "open_view", "recognise", "write_part"]

NAME = "native"
MANIFEST_ROOM_BYTES = 1 << 20
"""Free space asked for beyond the data itself."""


def open_view(root: str | Path, path: str) -> UniversalView:
    """The universal view of the committed checkpoint `path` under `root`: reads manifests only.

    Raises `CheckpointError` when it is not there, `CorruptCheckpoint` when a manifest or a file's size is wrong.
    """
    directory = checkpoint_directory(parse_root(root), path)
    with uncollected():
        return _view(LocalFiles(directory), load_manifest(LocalFiles(directory)))


def _view(files: Files, manifest: Manifest) -> UniversalView:
    states: list[dict[str, Any]] = []

    def parts() -> Iterator[PartManifest[PartTensors]]:
        for part in load_parts(files, manifest):
            states.append(part.state)
            yield part

    tensors = merge_parts(folder_name(files), parts())
    step, generation = manifest.step, manifest.generation
    return UniversalView(files, step=step, generation=generation, state=merge_states(states), tensors=tensors)


def recognise(files: Files) -> bool:
    """Whether the files are a native checkpoint, or the folder of them."""
    if parse_directory_name(folder_name(files)) is not None:
        return any(name.startswith("part-") for name in files.names()) or MANIFEST in files.names()
    return bool(_folders(files))


def open_files(files: Files, reading: Reading) -> UniversalView:
    """The view of the newest committed checkpoint, or of the one whose step or name `reading.tag` gives."""
    if parse_directory_name(folder_name(files)) is not None:
        return _view(files, load_manifest(files))
    steps = []
    for name in _folders(files):
        try:
            folder = files_at(f"{files.location}/{name}")
            manifest = load_manifest(folder)
        except CheckpointError:  # not committed, or damaged: no reader could use it
            continue
        if reading.tag in (None, name, str(manifest.step)):
            return _view(folder, manifest)
        steps.append(str(manifest.step))
    if not steps:
        raise CheckpointError(
            f"{files.location} holds no committed checkpoint: give the folder that a job's checkpoint.uri names"
        )
    raise CheckpointError(
        f"{files.location} holds no committed checkpoint {reading.tag}: choose one of the steps {', '.join(steps[:10])}"
    )


def _folders(files: Files) -> list[str]:
    """The folders that are named as checkpoints, newest (highest step, then generation) first."""
    named = {name: parse_directory_name(name) for name in {one.partition("/")[0] for one in files.names()}}
    return sorted(
        (name for name, found in named.items() if found), key=lambda name: named[name] or (0, 0), reverse=True
    )


def write_part(
    root: str | Path,
    *,
    generation: int,
    step: int,
    rank: int,
    world_size: int,
    pieces: Sequence[Piece],
    state: dict[str, Any],
    stall_s: float,
) -> SaveReport:
    """Write what this rank saves of `step`; durable when it returns, visible to readers only once committed.

    `stall_s` (seconds that training stood still) is passed on in the report. Raises `CheckpointError` when a piece does
    not fit its box, the state is not JSON-able or the disk is full; `Refused` when a newer generation has begun or the
    step is committed already with other contents.
    """
    began = time.perf_counter()
    base = create_root(root)
    require_fence(base, generation)
    solid = _solid(pieces)
    header = _header(solid)
    file_bytes = len(header) + sum(piece.data.nbytes for piece in solid)
    _require_jsonable(state)
    require_space(base, file_bytes + MANIFEST_ROOM_BYTES)
    directory = _make_directory(base, directory_name(step, generation))
    new_data, new_manifest = temporary(directory / data_name(rank)), temporary(directory / part_name(rank))
    try:
        digests = _write_data(new_data, header, solid)
        tensors = _tensors(pieces, solid, digests, len(header))
        part = PartManifest(
            generation, step, rank, world_size, file_bytes, len(header), digest_of(header), tensors, state
        )
        text = encode_part(part)
        write_synced(new_manifest, text)
        _put(directory, rank, new_data, new_manifest, text)
    except OSError as error:
        raise _failed(error, directory, rank) from error
    finally:
        new_data.unlink(missing_ok=True)
        new_manifest.unlink(missing_ok=True)
    return SaveReport(
        generation=generation,
        step=step,
        rank=rank,
        part=f"{directory.name}/{part_name(rank)}",
        digest=digest_of(text),
        size_bytes=file_bytes + len(text),
        stall_s=stall_s,
        write_s=time.perf_counter() - began,
    )


def _solid(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with bytes, each checked, widest items first: so every chunk is aligned in the file."""
    seen: set[tuple[str, tuple[int, ...]]] = set()
    solid = []
    for piece in pieces:
        _check(piece)
        if piece.box.elements:
            if (piece.name, piece.box.offsets) in seen:
                raise CheckpointError(f"{piece.name} is saved twice at {piece.box}: save each box once")
            seen.add((piece.name, piece.box.offsets))
            solid.append(piece)
    return sorted(solid, key=lambda piece: -ITEM_BYTES[piece.dtype])


def _check(piece: Piece) -> None:
    if piece.dtype not in ITEM_BYTES or piece.kind not in KINDS or (piece.kind == "state") != (piece.state is not None):
        raise CheckpointError(
            f"{piece.name} is a {piece.kind} of dtype {piece.dtype}, which the native format does not hold: convert it"
        )
    if not piece.box.inside(piece.shape):
        raise CheckpointError(f"{piece.name} of shape {list(piece.shape)} does not hold the box {piece.box}")
    if not piece.data.c_contiguous or piece.data.nbytes != piece.box.elements * ITEM_BYTES[piece.dtype]:
        raise CheckpointError(
            f"{piece.name} {piece.box} of dtype {piece.dtype} does not fit its {piece.data.nbytes} bytes of data: "
            "give the box's bytes, C-contiguous"
        )


def _header(solid: Sequence[Piece]) -> bytes:
    """The safetensors header, padded with spaces so that the data begin at a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "regrow"}}
    position = 0
    for piece in solid:
        end = position + piece.data.nbytes
        key = f"{piece.name}@{','.join(map(str, piece.box.offsets))}"
        entries[key] = {"dtype": piece.dtype, "shape": piece.box.sizes, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _require_jsonable(state: dict[str, Any]) -> None:
    try:
        json.dumps(state)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the state to save is not JSON-able ({error}): save numbers, strings, lists and mappings"
        ) from error
    _require_text_keys(state, "the state")


def _require_text_keys(value: Any, where: str) -> None:
    """JSON would turn other keys into strings without a word, and the state restored would be another one."""
    if isinstance(value, dict):
        for key, member in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} to save has the key {key!r}: JSON keeps string keys only, convert it")
            _require_text_keys(member, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for member in value:
            if isinstance(member, dict | list | tuple):
                _require_text_keys(member, where)


def _make_directory(root: Path, name: str) -> Path:
    directory = root / name
    try:
        directory.mkdir(exist_ok=True)
        sync_directory(root)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be made ({error.strerror}): make it writable") from error
    return directory


def _write_data(path: Path, header: bytes, solid: Sequence[Piece]) -> list[str]:
    """One sequential, synced write; returns each piece's digest."""
    digests = []
    with path.open("wb", buffering=1 << 20) as file:
        file.write(header)
        for piece in solid:
            data = piece.data.cast("B")
            file.write(data)
            digests.append(digest_of(data))
        file.flush()
        os.fsync(file.fileno())
    return digests


def _tensors(
    pieces: Sequence[Piece], solid: Sequence[Piece], digests: Sequence[str], begin: int
) -> tuple[PartTensor, ...]:
    chunks: dict[str, list[PartChunk]] = {piece.name: [] for piece in pieces}
    for piece, digest in zip(solid, digests, strict=True):
        end = begin + piece.data.nbytes
        chunks[piece.name].append(PartChunk(piece.box, begin, end, digest))
        begin = end
    firsts: dict[str, Piece] = {}
    for piece in pieces:
        first = firsts.setdefault(piece.name, piece)
        if (first.kind, first.dtype, first.shape) != (piece.kind, piece.dtype, piece.shape):
            raise CheckpointError(f"pieces of {piece.name} disagree about its kind, dtype or shape: save one tensor")
    return tuple(
        PartTensor(one.parameter, one.state, one.kind, one.dtype, one.shape, tuple(chunks[name]))
        for name, one in firsts.items()
    )


def _put(directory: Path, rank: int, new_data: Path, new_manifest: Path, text: bytes) -> None:
    """Rename both files into place, unless they are there already; a committed step accepts no others."""
    data, manifest = directory / data_name(rank), directory / part_name(rank)
    with locked(directory.parent, shared=True):
        if manifest.exists() and data.exists() and manifest.read_bytes() == text:
            return
        if (directory / MANIFEST).exists():
            raise Refused(f"{directory} is committed already with other contents: save a later step")
        if manifest.exists():
            # From an earlier process of this generation: it must never describe the data that come now.
            manifest.unlink()
            sync_directory(directory)
        new_data.replace(data)
        new_manifest.replace(manifest)
        sync_directory(directory)


def _failed(error: OSError, directory: Path, rank: int) -> CheckpointError:
    advice = "make room or keep fewer checkpoints" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the disk"
    return CheckpointError(f"part {rank} of {directory} was not written ({error.strerror}): {advice}")
