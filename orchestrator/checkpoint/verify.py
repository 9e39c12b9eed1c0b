"""Proof that a checkpoint is whole: every byte under its checksum, every element held exactly once."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.layout import LogicalTensor
from orchestrator.checkpoint.manifest import MANIFEST, PartManifest, data_name
from orchestrator.checkpoint.parts import load_manifest, load_part, merge_parts
from orchestrator.checkpoint.root import parse_root
from orchestrator.checkpoint.store import check_coverage
from orchestrator.core.errors import CheckpointError

BLOCK_BYTES = 4 << 20
"""Read at a time and thread: small enough to be hashed while it is in cache."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked: bytes read, how long it took, how many logical tensors."""

    bytes: int
    seconds: float
    tensors: int


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
