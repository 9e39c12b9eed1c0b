"""Proof that a checkpoint is whole: every byte under its checksum, every element held exactly once.

Foreign formats keep fewer checksums: CRC-32 in what `torch.save` wrote, none in plain safetensors files. There the
proof is that all elements are there, once, and can be read.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from orchestrator.checkpoint.archive import check_records
from orchestrator.checkpoint.convert import prove
from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import Files, LocalFiles, read_blocks
from orchestrator.checkpoint.formats import open_checkpoint, universal
from orchestrator.checkpoint.layout import LogicalTensor
from orchestrator.checkpoint.manifest import MANIFEST, PartManifest, data_name
from orchestrator.checkpoint.parts import load_manifest, load_part, merge_parts
from orchestrator.checkpoint.root import parse_root
from orchestrator.checkpoint.store import check_coverage
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

BLOCK_BYTES = 4 << 20
"""Read at a time and thread: small enough to be hashed while it is in cache."""


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
    base = parse_root(root)
    manifest = load_manifest(base, path)
    directory = base / path
    parts = [
        load_part(directory, entry, step=manifest.step, generation=manifest.generation, world_size=len(manifest.parts))
        for entry in manifest.parts
    ]
    tensors = merge_parts(directory, parts)
    check_coverage(path, tensors.values())
    for tensor in tensors.values():
        _check_replicas(path, tensor)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        checked = list(pool.map(lambda part: _check_file(directory / data_name(part.rank), part), parts))
    return Verified(sum(checked), time.perf_counter() - began, len(tensors))


def _check_replicas(path: str, tensor: LogicalTensor) -> None:
    digests: dict[object, str | None] = {}
    for chunk in tensor.chunks:
        if digests.setdefault(chunk.box, chunk.digest) != chunk.digest:
            raise corrupt(f"{path}/{MANIFEST}", f"the replicas of chunk {chunk.box} differ", tensor.name)


def _check_file(file: Path, part: PartManifest) -> int:
    ranges = [_Range(0, part.header_bytes, part.header_digest, None, "the header")]
    ranges += [
        _Range(chunk.begin, chunk.end, chunk.digest, tensor.name, f"chunk {chunk.box}")
        for tensor in part.tensors
        for chunk in tensor.chunks
    ]
    ranges.sort(key=lambda one: one.begin)
    block = memoryview(bytearray(BLOCK_BYTES))
    try:
        with file.open("rb", buffering=0) as stream:
            for one in ranges:
                _check_range(stream.fileno(), file, one, block)
    except OSError as error:
        raise CheckpointError(f"checkpoint file {file} cannot be read ({error.strerror}): make it readable") from error
    return part.file_bytes


def _check_range(descriptor: int, file: Path, one: _Range, block: memoryview) -> None:
    hasher = xxhash.xxh3_128()
    position = one.begin
    while position < one.end:
        count = os.preadv(descriptor, [block[: one.end - position]], position)
        if count == 0:
            raise corrupt(f"{file.parent.name}/{file.name}", f"it ends at byte {position}", one.tensor)
        hasher.update(block[:count])
        position += count
    if hasher.hexdigest() != one.digest:
        reason = f"the bytes of {one.what} do not match their checksum"
        raise corrupt(f"{file.parent.name}/{file.name}", reason, one.tensor)


# ---------------------------------------------------------------- any format


def verify_any(
    location: str | Path, *, source: str | None = None, tag: str | None = None, threads: int = 2
) -> Verified:
    """Re-read the checkpoint at `location`, whatever wrote it; raises as `verify` does."""
    began = time.perf_counter()
    view = open_checkpoint(location, source=source, tag=tag)
    if view.source == "native" and isinstance(view.files, LocalFiles):
        return verify(view.files.directory.parent, view.files.directory.name, threads=threads)
    prove(view)
    ranges = universal.read_ranges(view.files) if view.source == universal.NAME else None
    with ThreadPoolExecutor(max(1, threads)) as pool:
        if ranges is not None:
            counts = list(pool.map(lambda one: (_check_bytes(view.files, *one), 0), ranges))
        else:
            counts = list(pool.map(lambda one: _check_foreign(view.files, *one), sorted(_places(view))))
    checked, unproven = sum(one for one, _ in counts), sum(one for _, one in counts)
    return Verified(checked + unproven, time.perf_counter() - began, len(view.tensors), unproven)


def _places(view: UniversalView) -> set[tuple[str, int, int | None]]:
    """(file, first byte, length) of the blobs that hold the tensors; length None = the whole file."""
    places: set[tuple[str, int, int | None]] = set()
    for tensor in view.tensors.values():
        for chunks in (tensor.chunks, *tensor.others):
            for chunk in chunks:
                if chunk.file:
                    whole = chunk.blob_bytes is None
                    places.add((chunk.file, 0 if whole else chunk.begin, chunk.blob_bytes))
    return places


def _check_bytes(files: Files, file: str, begin: int, end: int, digest: str) -> int:
    hasher = xxhash.xxh3_128()
    for block in read_blocks(files, file, begin, end):
        hasher.update(block)
    if hasher.hexdigest() != digest:
        raise corrupt(files.label(file), f"bytes {begin}..{end} do not match their checksum")
    return end - begin


def _check_foreign(files: Files, file: str, begin: int, count: int | None) -> tuple[int, int]:
    """(bytes under a checksum, bytes without)."""
    end = files.size(file) if count is None else begin + count
    proven = check_records(files, file, begin, end - begin)
    if proven is not None:
        return proven, 0
    return 0, sum(block.nbytes for block in read_blocks(files, file, begin, end))
