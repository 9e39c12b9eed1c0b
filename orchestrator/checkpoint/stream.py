"""Writing tensors of a view into files as a streamed copy: bounded memory, several threads, a checksum per segment."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from orchestrator.checkpoint.layout import ITEM_BYTES, Box
from orchestrator.checkpoint.numbers import convert
from orchestrator.checkpoint.view import UniversalView

BLOCK_BYTES = 512 << 10
"""Copied at a time and thread: small enough to be hashed and written while it is in cache. Measured on 1.8 GB and two
cores: 1.1 s; 1.2 to 1.7 s with blocks of 1 or 2 MiB, whose threads also wait longer for each other at one file."""
SEGMENT_BYTES = 64 << 20
"""A longer range of a tensor is cut into segments, so that threads share it and a restart repeats little."""

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call, from any thread."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A box of a tensor whose row-major elements go to bytes `begin ..` of a file."""

    tensor: str
    box: Box
    dtype: str
    """dtype in the file; another than the tensor's own is rounded to."""
    begin: int

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return self.box.elements * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """First byte after it."""
        return self.begin + self.size_bytes


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to be written: literal bytes (headers) and segments. Together they tile it."""

    name: str
    size_bytes: int
    literals: tuple[tuple[int, bytes], ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a conversion may use, and what it waits for."""

    memory_bytes: int = 512 << 20
    """For buffers; the interpreter and the metadata come on top."""
    workers: int = 0
    """Threads; 0 = as many as cores, at most 8."""
    durable: bool = False
    """Wait until all is on the disk before the target appears under its name, so that it also survives a loss of power.
    Otherwise the kernel writes it back, as after `cp`, and `verify` would find what was lost."""

    @property
    def threads(self) -> int:
        """Threads to start: each gets a few blocks of memory."""
        wanted = self.workers or min(8, os.cpu_count() or 1)
        return max(1, min(wanted, self.memory_bytes // (4 * 4096)))

    @property
    def block_bytes(self) -> int:
        """Largest block of a thread; copies that are rearranged or averaged need up to four of them."""
        return max(4096, min(BLOCK_BYTES, self.memory_bytes // (4 * self.threads)))


def cut(tensor: str, box: Box, dtype: str, begin: int, largest_bytes: int = SEGMENT_BYTES) -> list[Segment]:
    """The box as segments of at most `largest_bytes` (at least one element) that follow one another in the file."""
    segments = []
    for part in bands(box, max(1, largest_bytes // ITEM_BYTES[dtype])):
        segments.append(Segment(tensor, part, dtype, begin))
        begin = segments[-1].end
    return segments


def bands(box: Box, most_elements: int) -> Iterator[Box]:
    """The box as boxes of at most `most_elements`, in the row-major order of its elements."""
    if box.elements <= most_elements:
        yield box
        return
    row = box.elements // box.sizes[0]
    if row <= most_elements:
        count = most_elements // row
        for start in range(0, box.sizes[0], count):
            size = min(count, box.sizes[0] - start)
            yield Box((box.offsets[0] + start, *box.offsets[1:]), (size, *box.sizes[1:]))
        return
    rest = Box(box.offsets[1:], box.sizes[1:])
    for index in range(box.sizes[0]):
        for part in bands(rest, most_elements):
            yield Box((box.offsets[0] + index, *part.offsets), (1, *part.sizes))


def write_files(
    view: UniversalView,
    directory: Path,
    outputs: Sequence[OutputFile],
    *,
    limits: Limits,
    progress: Progress,
    done: Mapping[tuple[int, Segment], str],
    record: Callable[[int, Segment, str], None],
) -> dict[tuple[int, Segment], str]:
    """Write all files; returns the checksum (xxh3-128, hex) of every segment by file index.

    Segments in `done` (file index, segment -> checksum) are left as they are; `record` is told of each that was
    written, from any thread. Raises what reading raises, and `OSError` when a file cannot be written; the first error
    stops all threads.
    """
    digests: dict[tuple[int, Segment], str] = {}
    for output in outputs:
        _create(directory, output)
    local = threading.local()
    failed = threading.Event()

    def work(job: tuple[int, Segment]) -> None:
        if failed.is_set():
            return
        index, segment = job
        if not hasattr(local, "block"):
            local.block = bytearray(limits.block_bytes)
        try:
            digest = _copy(view, segment, directory / outputs[index].name, local.block, progress)
        except BaseException:
            failed.set()
            raise
        digests[index, segment] = digest
        record(index, segment, digest)

    jobs = [(index, segment) for index, output in enumerate(outputs) for segment in output.segments]
    jobs.sort(key=lambda job: job[1].begin / outputs[job[0]].size_bytes)  # threads wait for each other at one file
    for job in jobs:
        if job in done:
            digests[job] = done[job]
    with ThreadPoolExecutor(limits.threads) as pool:
        waiting = [pool.submit(work, job) for job in jobs if job not in done]
        for one in waiting:
            one.result()
    return digests


def _create(directory: Path, output: OutputFile) -> None:
    """The file at its full size, its literal bytes written; what an earlier attempt wrote into it stays."""
    path = directory / output.name
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(handle, output.size_bytes)
        for begin, data in output.literals:
            os.pwrite(handle, data, begin)
    finally:
        os.close(handle)


def _copy(view: UniversalView, segment: Segment, path: Path, block: bytearray, progress: Progress) -> str:
    """Copy one segment; returns its checksum. The file is open meanwhile only: there may be thousands of them."""
    hasher = xxhash.xxh3_128()
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for target, data in blocks(view, segment, block):
            hasher.update(data)
            written = 0
            while written < data.nbytes:
                written += os.pwrite(handle, data[written:], target + written)
            progress(data.nbytes)
    finally:
        os.close(handle)
    return hasher.hexdigest()


def blocks(view: UniversalView, segment: Segment, block: bytearray) -> Iterator[tuple[int, memoryview]]:
    """(Byte in the file, contents) of a segment, piece by piece; each is valid until the next is asked for."""
    tensor = view.tensors[segment.tensor]
    item = tensor.item_bytes
    begin = segment.begin
    runs = view.runs(segment.tensor, segment.box) if segment.dtype == tensor.dtype else None
    if runs is not None:  # nearly always: nothing is looked at for each block then
        for file, start, count in runs:
            for done in range(0, count, len(block)):
                piece = memoryview(block)[: count - done]
                view.files.read_into(file, start + done, piece)
                yield begin, piece
                begin += piece.nbytes
        return
    most = max(1, len(block) // max(item, ITEM_BYTES[segment.dtype]))
    for part in bands(segment.box, most):
        piece = memoryview(block)[: part.elements * item]
        view.read(segment.tensor, part, piece)
        if segment.dtype != tensor.dtype:
            piece = memoryview(convert(np.frombuffer(piece, np.uint8), tensor.dtype, segment.dtype).data)
        yield begin, piece
        begin += piece.nbytes
