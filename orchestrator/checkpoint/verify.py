"""Proof that a checkpoint is whole: every byte under its checksum, every element held exactly once.

Foreign formats keep fewer checksums: CRC-32 in what `torch.save` wrote, none in plain safetensors files. There the
proof is that all elements are there, once, and can be read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from orchestrator.checkpoint.archive import check_records
from orchestrator.checkpoint.fields import corrupt, naming
from orchestrator.checkpoint.files import Files, LocalFiles, folder_name, read_blocks
from orchestrator.checkpoint.formats import open_checkpoint, universal
from orchestrator.checkpoint.layout import LogicalTensor
from orchestrator.checkpoint.manifest import MANIFEST, PartManifest, data_name
from orchestrator.checkpoint.part_tensors import PartTensor
from orchestrator.checkpoint.parts import load_manifest, load_parts, merge_parts
from orchestrator.checkpoint.reshard import flaw_of
from orchestrator.checkpoint.root import checkpoint_directory, parse_root
from orchestrator.checkpoint.store import check_coverage
from orchestrator.checkpoint.stream import Progress
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CorruptCheckpoint


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked: bytes read, how long it took, how many logical tensors."""

    bytes: int
    seconds: float
    tensors: int
    unproven: int = 0
    """Bytes that were read but that the format keeps no checksum of."""


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes of a file with their checksum."""

    begin: int
    end: int
    digest: str
    tensor: str | None
    what: str


def verify(root: str | Path, path: str, *, threads: int = 2) -> Verified:
    """Re-read the committed checkpoint `path` under `root`.

    Raises `CorruptCheckpoint` naming file and tensor: a wrong checksum, a part that is missing, swapped or of the wrong
    size, an element that no chunk or more than one holds, replicas that differ. `CheckpointError` when it is not there.
    """
    began = time.perf_counter()
    files = LocalFiles(checkpoint_directory(parse_root(root), path))
    tensors, checked = _check_native(files, threads)
    return Verified(checked, time.perf_counter() - began, tensors)


def _check_native(files: Files, threads: int, progress: Progress = lambda count: None) -> tuple[int, int]:
    """Re-read a native checkpoint; returns its logical tensors and the bytes read."""
    parts = list(load_parts(files, load_manifest(files)))
    name = folder_name(files)
    tensors = merge_parts(name, parts)
    check_coverage(name, tensors.values())
    for tensor in tensors.values():
        _check_replicas(name, tensor)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return len(tensors), sum(pool.map(lambda part: _check_file(files, part, progress), parts))


def _check_replicas(name: str, tensor: LogicalTensor) -> None:
    digests: dict[object, str | None] = {}
    for chunk in tensor.chunks:
        if digests.setdefault(chunk.box, chunk.digest) != chunk.digest:
            raise corrupt(f"{name}/{MANIFEST}", f"the replicas of chunk {chunk.box} differ", tensor.name)


def _check_file(files: Files, part: PartManifest[Sequence[PartTensor]], progress: Progress) -> int:
    ranges = [_Range(0, part.header_bytes, part.header_digest, None, "the header")]
    ranges += [
        _Range(chunk.begin, chunk.end, chunk.digest, tensor.name, f"chunk {chunk.box}")
        for tensor in part.tensors
        for chunk in tensor.chunks
    ]
    for one in sorted(ranges, key=lambda one: one.begin):
        _check_range(files, data_name(part.rank), one)
        progress(one.end - one.begin)
    return part.file_bytes


def _check_range(files: Files, file: str, one: _Range) -> None:
    hasher = xxhash.xxh3_128()
    try:
        for block in read_blocks(files, file, one.begin, one.end):
            hasher.update(block)
    except CorruptCheckpoint as error:
        if one.tensor is None:
            raise
        raise naming(error, one.tensor) from error
    if hasher.hexdigest() != one.digest:
        raise corrupt(files.label(file), f"the bytes of {one.what} do not match their checksum", one.tensor)


# ---------------------------------------------------------------- any format


def verify_any(
    location: str | Path, *, source: str | None = None, tag: str | None = None, threads: int = 2
) -> Verified:
    """Re-read the checkpoint at `location`, whatever wrote it; raises as `verify` does."""
    began = time.perf_counter()
    view = open_checkpoint(location, source=source, tag=tag)
    prove(view)
    checked, unproven = check_bytes(view, threads=threads)
    return Verified(checked + unproven, time.perf_counter() - began, len(view.tensors), unproven)


def prove(view: UniversalView) -> None:
    """Raises `CorruptCheckpoint` unless every element of every tensor is held exactly once, in each of its copies."""
    for tensor in view.tensors.values():
        for chunks in (tensor.chunks, *tensor.others):
            reason = flaw_of(tensor.shape, chunks)
            if reason is not None:
                file = next((chunk.file for chunk in chunks if chunk.file), None)
                raise corrupt(view.files.label(file) if file else view.files.location, reason, tensor.name)


def check_bytes(view: UniversalView, *, threads: int = 2, progress: Progress = lambda count: None) -> tuple[int, int]:
    """Read what holds the view's tensors and compare it with the checksums that there are.

    Returns the bytes compared and the bytes that were read without a checksum; raises `CorruptCheckpoint`.
    """
    if view.source == "native":
        return _check_native(view.files, threads, progress)[1], 0
    with ThreadPoolExecutor(max(1, threads)) as pool:
        if view.source == universal.NAME:
            ranges = universal.read_ranges(view.files)
            counts = list(pool.map(lambda one: (_check_bytes(view.files, one, progress), 0), ranges))
        else:
            places = sorted(_places(view).items(), key=lambda one: (one[0][0], one[0][1]))
            counts = list(pool.map(lambda one: _check_foreign(view.files, one[0], one[1], progress), places))
    return sum(one for one, _ in counts), sum(one for _, one in counts)


def _places(view: UniversalView) -> dict[tuple[str, int, int | None], dict[int, str]]:
    """(file, first byte, length) of each blob that holds tensors -> where they begin; length None = the whole file."""
    places: dict[tuple[str, int, int | None], dict[int, str]] = {}
    for tensor in view.tensors.values():
        for chunks in (tensor.chunks, *tensor.others):
            for chunk in chunks:
                if chunk.file and chunk.box.elements:
                    blob = chunk.blob_bytes
                    key = (chunk.file, 0 if blob is None else chunk.begin, blob)
                    places.setdefault(key, {})[chunk.begin] = tensor.name
    return places


def _check_bytes(files: Files, one: tuple[str, int, int, str], progress: Progress) -> int:
    file, begin, end, digest = one
    hasher = xxhash.xxh3_128()
    for block in read_blocks(files, file, begin, end):
        hasher.update(block)
    if hasher.hexdigest() != digest:
        raise corrupt(files.label(file), f"bytes {begin}..{end} do not match their checksum")
    progress(end - begin)
    return end - begin


def _check_foreign(
    files: Files, place: tuple[str, int, int | None], wanted: dict[int, str], progress: Progress
) -> tuple[int, int]:
    """(bytes under a checksum, bytes without)."""
    file, begin, count = place
    end = files.size(file) if count is None else begin + count
    counts = check_records(files, file, begin, end - begin, wanted if count is None else None)
    if counts is None:
        counts = 0, sum(block.nbytes for block in read_blocks(files, file, begin, end))
    progress(sum(counts))
    return counts
