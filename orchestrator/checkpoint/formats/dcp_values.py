"""The entries of a distributed checkpoint that are not tensors, and its scalars, as plain values. No torch.

Equal values are equal bytes in these files, so a parameter group's hyper-parameters, written once for each parameter,
are decoded once.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

from orchestrator.checkpoint.archive import StoredTensor, load_archive, open_blob
from orchestrator.checkpoint.fields import corrupt, naming
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.dcp_metadata import Blob, Inventory, Saved
from orchestrator.checkpoint.layout import ITEM_BYTES
from orchestrator.checkpoint.unpickle import PickleError, unpickle
from orchestrator.core.errors import CorruptCheckpoint

MAX_VALUE_BYTES = 1 << 24
"""Entries larger than this are left out: they are no settings."""
_RUN_BYTES = 1 << 22
_GAP_BYTES = 1 << 12
_NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "U8": "<B", "BOOL": "<?"}


class Unread:
    """Stands for a value that is left out; `why` completes a sentence that begins with it."""

    def __init__(self, why: str) -> None:
        self.why = why


class Values:
    """Plain values of a checkpoint by key."""

    def __init__(self, files: Files, inventory: Inventory) -> None:
        self.files = files
        self.inventory = inventory
        self._decoded: dict[bytes, Any] = {}
        self._inner: dict[bytes, tuple[int, str]] = {}

    def plain(self) -> dict[str, Any]:
        """Every entry that is not a tensor; `Unread` for what is too large or of an unknown kind."""
        found: dict[str, Any] = {}
        small = []
        for key, blob in self.inventory.blobs.items():
            if blob.size > MAX_VALUE_BYTES:
                found[key] = Unread(f"has {blob.size} bytes")
            else:
                small.append((key, blob))
        for key, blob, data in self._contents(small):
            if data not in self._decoded:
                self._decoded[data] = self._decode(key, blob, data)
            found[key] = self._decoded[data]
        return found

    def scalars(self, keys: Iterable[str]) -> dict[str, float | int]:
        """The numbers in tensors of one element; other tensors are left out."""
        found: dict[str, float | int] = {}
        wanted = []
        for key in keys:
            saved = self.inventory.tensors[key]
            if math.prod(saved.shape) != 1 or len(saved.chunks) < 1 or saved.dtype not in (*_NUMBERS, "BF16"):
                continue
            chunk = saved.chunks[0]
            item = ITEM_BYTES[saved.dtype]
            wanted.append((key, Blob(chunk.file, chunk.begin, chunk.blob_bytes or item)))
        for key, blob, data in self._contents([one for one in wanted if one[1].size <= MAX_VALUE_BYTES]):
            saved = self.inventory.tensors[key]
            if saved.chunks[0].blob_bytes is not None:
                data = self._element(key, blob, data, saved)
            if saved.dtype == "BF16":
                found[key] = struct.unpack("<f", b"\0\0" + data)[0]
            else:
                found[key] = struct.unpack(_NUMBERS[saved.dtype], data)[0]
        return found

    def _element(self, key: str, blob: Blob, data: bytes, saved: Saved) -> bytes:
        """The one element of a serialised tensor."""
        if data not in self._inner:
            try:
                _require_checksums(data, self.files.label(blob.file), key)
                stored = open_blob(self.files, *blob)
            except CorruptCheckpoint as error:
                raise naming(error, key) from error
            if stored.dtype != saved.dtype or stored.elements != 1:
                reason = f"at byte {blob.begin} it holds {stored.dtype} {list(stored.shape)} instead of one number"
                raise corrupt(self.files.label(blob.file), reason, key)
            self._inner[data] = stored.begin - blob.begin, stored.dtype
        begin, dtype = self._inner[data]
        if dtype != saved.dtype:
            raise corrupt(self.files.label(blob.file), f"at byte {blob.begin} it holds {dtype}", key)
        return data[begin : begin + ITEM_BYTES[dtype]]

    def _decode(self, key: str, blob: Blob, data: bytes) -> Any:
        try:
            if data.startswith(b"PK\x03\x04"):
                _require_checksums(data, self.files.label(blob.file), key)
                value = load_archive(self.files, *blob)
                return Unread("is a tensor inside a plain entry") if isinstance(value, StoredTensor) else value
            return unpickle(data)
        except CorruptCheckpoint as error:
            if isinstance(error.__cause__, PickleError):  # well stored, but it names what is not known here
                return Unread(f"is of a kind that is not read ({error.__cause__})")
            raise naming(error, key) from error
        except PickleError as error:
            return Unread(f"is of a kind that is not read ({error})")

    def _contents(self, wanted: list[tuple[str, Blob]]) -> Iterator[tuple[str, Blob, bytes]]:
        """The bytes of each entry, of which neighbours are read together."""
        wanted = sorted(wanted, key=lambda one: one[1])
        at = 0
        while at < len(wanted):
            first = wanted[at][1]
            begin, end, stop = first.begin, first.begin + first.size, at + 1
            while stop < len(wanted):
                blob = wanted[stop][1]
                after = blob.begin + blob.size
                if blob.file != first.file or blob.begin > end + _GAP_BYTES or after > begin + _RUN_BYTES:
                    break
                end, stop = max(end, after), stop + 1
            data = bytearray(end - begin)
            self.files.read_into(first.file, begin, memoryview(data))
            for key, blob in wanted[at:stop]:
                yield key, blob, bytes(data[blob.begin - begin : blob.begin - begin + blob.size])
            at = stop


def _require_checksums(data: bytes, label: str, key: str) -> None:
    """Compare the checksums that torch writes into its archives, of these few that are read whole (0 is none)."""
    left = len(data)  # entries that share bytes must not make this slow
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                left -= entry.file_size
                if entry.CRC and entry.compress_type == zipfile.ZIP_STORED and left >= 0:
                    archive.read(entry)
    except (zipfile.BadZipFile, RuntimeError, struct.error, ValueError, EOFError) as error:
        raise corrupt(label, f"its archive is damaged ({str(error)[:100]})", key) from error


def jsonable(value: Any, depth: int = 0) -> Any:
    """The value with lists for tuples and strings for keys; raises `TypeError` naming what JSON cannot hold."""
    if depth > 32:
        raise TypeError("it is nested too deeply")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [jsonable(one, depth + 1) for one in value]
    if isinstance(value, dict):
        found = {}
        for key, member in value.items():
            if type(key) not in (str, int, float, bool):
                raise TypeError(f"it has a {type(key).__name__} as a key")
            found[str(key)] = jsonable(member, depth + 1)
        return found
    if isinstance(value, Unread):
        raise TypeError(f"it {value.why}")
    raise TypeError(f"it holds a {type(value).__name__}")


def with_lists(value: Any) -> Any:
    """The mapping with lists where its keys were positions."""
    if not isinstance(value, dict):
        return value
    if value and all(type(key) is int for key in value) and sorted(value) == list(range(len(value))):
        return [with_lists(value[key]) for key in range(len(value))]
    return {str(key): with_lists(member) for key, member in value.items()}
