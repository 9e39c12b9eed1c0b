"""Files that `torch.load` reads, laid out before any tensor is read, so that tensors are streamed into them.

A stored zip archive with the pickle first and one entry per storage, whose checksums are filled in at the end.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from isal import isal_zlib

from orchestrator.checkpoint.formats.torch_pickle import encode
from orchestrator.checkpoint.layout import ITEM_BYTES, Box
from orchestrator.checkpoint.stream import BLOCK_BYTES, OutputFile, Segment, cut

ALIGNMENT = 64
"""Bytes: storages begin at a multiple of it, as in torch's own archives."""
FOLDER = "archive"
_LARGE = 0xFFFFFFFF
"""Sizes and positions from here on are written in fields of their own (zip64)."""
_LOCAL, _CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
_LOCAL_CHECKSUM, _CENTRAL_CHECKSUM = 14, 16
"""Where the checksum is in both headers of an entry."""


@dataclass(frozen=True, slots=True)
class Storage:
    """What one storage holds: a tensor of the view, some bytes, or zeros."""

    dtype: str
    shape: tuple[int, ...]
    tensor: str | None = None
    """Name of a tensor of the view, which is rounded to `dtype` where it has another."""
    data: bytes | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A file as it is laid out, and which checksums it lacks until its tensors are written."""

    output: OutputFile
    streamed: tuple[tuple[int, int, tuple[int, int]], ...]
    """(First byte, number of bytes, the two places for the checksum) of storages."""
    begins: tuple[int, ...]
    """Where each storage begins."""

    def seal(self, directory: Path) -> None:
        """Fill in the checksums of the file as it is written in `directory`; raises `OSError`."""
        if not self.streamed:
            return
        block = memoryview(bytearray(BLOCK_BYTES))
        handle = os.open(directory / self.output.name, os.O_RDWR | os.O_CLOEXEC)
        try:
            for begin, count, places in self.streamed:
                checksum, done = 0, 0
                while done < count:
                    read = os.preadv(handle, [block[: count - done]], begin + done)
                    checksum = isal_zlib.crc32(block[:read], checksum)
                    done += read
                    if not read:
                        raise OSError(f"{self.output.name} was cut off while it was written")
                for place in places:
                    os.pwrite(handle, struct.pack("<L", checksum), place)
        finally:
            os.close(handle)


def archive(name: str, value: Any, storages: Sequence[Storage] = ()) -> TorchFile:
    """The file `name` of a value, whose `Tensor`s stand for the storages by their index."""
    growing = _Archive()
    growing.add("data.pkl", encode(value))
    growing.add("byteorder", b"little")
    for index, storage in enumerate(storages):
        growing.add_storage(f"data/{index}", storage)
    growing.add("version", b"3\n")
    growing.finish()
    output = OutputFile(name, growing.at, tuple(growing.literals), tuple(growing.segments))
    return TorchFile(output, tuple(growing.streamed), tuple(growing.begins))


@dataclass(slots=True)
class _Archive:
    at: int = 0
    literals: list[tuple[int, bytes]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    entries: list[bytes] = field(default_factory=list)
    unsummed: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(First byte, number of bytes, place for the checksum, entry) of storages."""
    streamed: list[tuple[int, int, tuple[int, int]]] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)

    def put(self, data: bytes) -> None:
        self.literals.append((self.at, data))
        self.at += len(data)

    def add(self, name: str, content: bytes) -> None:
        self.header(name, len(content), isal_zlib.crc32(content), aligned=False)
        self.put(content)

    def add_storage(self, name: str, storage: Storage) -> None:
        begin = self.at
        self.header(name, storage.size_bytes, isal_zlib.crc32(storage.data or b""), aligned=True)
        self.begins.append(self.at)
        if storage.data is not None:
            self.put(storage.data)
            return
        if storage.size_bytes:
            self.unsummed.append((self.at, storage.size_bytes, begin + _LOCAL_CHECKSUM, len(self.entries) - 1))
        if storage.tensor is not None and storage.size_bytes:
            self.segments += cut(storage.tensor, Box.whole(storage.shape), storage.dtype, self.at)
        self.at += storage.size_bytes  # what nothing is written to is zero

    def header(self, name: str, size_bytes: int, checksum: int, *, aligned: bool) -> None:
        path = f"{FOLDER}/{name}".encode()
        large = size_bytes >= _LARGE
        version, size = (45, _LARGE) if large else (20, size_bytes)
        sizes = struct.pack("<2H2Q", 1, 16, size_bytes, size_bytes) if large else b""
        fields = struct.pack("<5H3L", version, 0x0800, 0, 0, 0x21, checksum, size, size)
        padding = b""
        if aligned:  # an extra field of its own kind, as in torch's archives
            missing = -(self.at + 30 + len(path) + len(sizes) + 4) % ALIGNMENT
            padding = struct.pack("<2sH", b"FB", missing) + b"Z" * missing
        far = self.at >= _LARGE
        begin = self.at
        self.put(_LOCAL + fields + struct.pack("<2H", len(path), len(sizes) + len(padding)) + path + sizes + padding)
        wide = ((size_bytes, size_bytes) if large else ()) + ((begin,) if far else ())
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        lengths = struct.pack("<5H2L", len(path), len(extra), 0, 0, 0, 0, _LARGE if far else begin)
        self.entries.append(_CENTRAL + struct.pack("<H", 45) + fields + lengths + path + extra)

    def finish(self) -> None:
        start = self.at
        for begin, count, place, index in self.unsummed:
            central = start + sum(map(len, self.entries[:index])) + _CENTRAL_CHECKSUM
            self.streamed.append((begin, count, (place, central)))
        entries = b"".join(self.entries)
        self.put(entries)
        count = len(self.entries)
        if start >= _LARGE or count >= 0xFFFF:
            end = self.at
            sizes = struct.pack("<2H2L4Q", 45, 45, 0, 0, count, count, len(entries), start)
            self.put(b"PK\x06\x06" + struct.pack("<Q", len(sizes)) + sizes)
            self.put(b"PK\x06\x07" + struct.pack("<LQL", 0, end, 1))
        count, start = min(count, 0xFFFF), min(start, _LARGE)
        self.put(b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, count, count, len(entries), start, 0))
