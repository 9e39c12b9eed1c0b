"""`torch.save` files (zip archives) as metadata: which tensor lies where. Nothing of them is executed or copied."""

from __future__ import annotations

import bisect
import io
import itertools
import json
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from isal import isal_zlib

from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import MAX_METADATA_BYTES, Files, read_blocks
from orchestrator.checkpoint.layout import ITEM_BYTES, MAX_DIMENSIONS, is_row_major
from orchestrator.checkpoint.unpickle import Name, PickleError, Record, unpickle

TORCH_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
}
"""torch's names of dtypes -> safetensors' names."""
_STORAGES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "UntypedStorage": "U8",
    "CharStorage": "I8",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "FloatStorage": "F32",
    "LongStorage": "I64",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
    "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
}
_LOCAL_HEADER_BYTES = 30
NUMBER_BYTES = 64
"""Storages of at most so many bytes hold numbers (an optimizer's step), which are read with the metadata: they are
compared with their checksums at once."""
MAX_REPEATED_BYTES = 16 << 20
"""Of all expanded tensors of an archive: a small file must not stand for a huge checkpoint."""
_PLAIN_TENSORS = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_PLAIN_BUILDERS = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of an archive: its elements lie in `file` from byte `begin` on."""

    file: str
    begin: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    """In elements; None = row-major without gaps."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements, without what strides skip."""
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class _Storage:
    """Where an archive keeps a storage."""

    begin: int
    size_bytes: int
    dtype: str


def load_archive(files: Files, file: str, begin: int = 0, count: int | None = None) -> Any:
    """The object that `torch.save` wrote, with `StoredTensor` for tensors and `Record` for unknown classes.

    The archive is the whole file, or `count` bytes of it from `begin` on. Raises `CorruptCheckpoint` naming the file.
    """
    count = files.size(file) - begin if count is None else count
    try:
        return _Archive(files, file, begin, count).load()
    except PickleError as error:
        raise corrupt(files.label(file), f"its pickle is not read ({error})") from error
    except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError, ValueError, EOFError) as error:
        if begin == 0 and _starts_with(files, file, b"\x80\x02"):
            raise corrupt(
                files.label(file), "it is in torch's format from before 1.6: load and save it again"
            ) from error
        raise corrupt(files.label(file), f"it is not a torch.save archive ({str(error)[:100]})") from error


def open_blob(files: Files, file: str, begin: int, count: int) -> StoredTensor:
    """The one tensor serialised in `count` bytes of `file` from `begin` on, by `torch.save` or as safetensors.

    In an archive a mapping stands for the only tensor in it.
    """
    if count >= 4 and _starts_with(files, file, b"PK\x03\x04", begin):
        stored = load_archive(files, file, begin, count)
        members = stored.values() if isinstance(stored, dict) else (stored,)
        found = [one for one in members if isinstance(one, StoredTensor)]
        if len(found) == 1:
            return found[0]
        raise corrupt(files.label(file), f"at byte {begin} it holds a {type(stored).__name__} instead of a tensor")
    tensors = read_safetensors(files, file, begin, count)[0]
    if len(tensors) != 1:
        raise corrupt(files.label(file), f"at byte {begin} it holds {len(tensors)} tensors instead of one")
    return next(iter(tensors.values()))


def check_records(
    files: Files, file: str, begin: int, count: int, wanted: Mapping[int, str] | None = None
) -> tuple[int, int] | None:
    """Compare the records of an archive with their CRC-32; None where it is no archive.

    Returns the bytes compared, and those of records that were written without (as under `set_crc32_options(False)`,
    which leaves zero in its place). With `wanted` (byte of the file -> tensor) only the records that hold one of these
    bytes. Raises `CorruptCheckpoint` naming the record that differs, and a tensor in it.
    """
    if count < 4 or not _starts_with(files, file, b"PK\x03\x04", begin):
        return None
    try:
        archive = _Archive(files, file, begin, count)
        ranges = [(archive.start(entry), entry) for entry in archive.entries.values()]
    except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError, ValueError, EOFError) as error:
        raise corrupt(files.label(file), f"it is not a torch.save archive ({str(error)[:100]})") from error
    positions = sorted(wanted or ())
    checked = unproven = 0
    for start, entry in ranges:
        index = bisect.bisect_left(positions, start)
        inside = index < len(positions) and positions[index] < start + entry.file_size
        if wanted is not None and not inside:
            continue
        found = 0
        for block in read_blocks(files, file, start, start + entry.file_size):
            found = isal_zlib.crc32(block, found)
        if not entry.CRC and found:
            unproven += entry.file_size
            continue
        if found != entry.CRC:
            tensor = wanted[positions[index]] if wanted and inside else None
            raise corrupt(files.label(file), f"record {entry.filename} does not match its CRC-32", tensor)
        checked += entry.file_size
    return checked, unproven


def read_safetensors(
    files: Files, file: str, begin: int = 0, count: int | None = None
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file from its header alone; raises `CorruptCheckpoint`.

    Ranges must lie within the file, fit dtype and shape, and not overlap.
    """
    label = files.label(file)
    count = files.size(file) - begin if count is None else count
    if count < 8:
        raise corrupt(label, f"it has {count} bytes, too few for a safetensors header")
    length = int.from_bytes(_bytes(files, file, begin, 8), "little")
    if length > min(count - 8, MAX_METADATA_BYTES):
        raise corrupt(label, f"its safetensors header of {length} bytes does not fit into {count} bytes")
    try:
        header = json.loads(_bytes(files, file, begin + 8, length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise corrupt(label, f"its safetensors header is not JSON ({str(error)[:100]})") from error
    if not isinstance(header, dict):
        raise corrupt(label, "its safetensors header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt(label, "its safetensors metadata are not strings")
    base, room = begin + 8 + length, count - 8 - length
    tensors, ranges = {}, []
    for name, entry in header.items():
        tensor, end = _safe_entry(label, file, base, room, name, entry)
        tensors[name] = tensor
        ranges.append((tensor.begin, base + end, name))
    ranges.sort()
    for (_, end, _), (start, _, name) in itertools.pairwise(ranges):
        if start < end:
            raise corrupt(label, "its bytes overlap those of another tensor", name)
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object repeats a key")
    return found


def _safe_entry(label: str, file: str, base: int, room: int, name: str, entry: Any) -> tuple[StoredTensor, int]:
    if not isinstance(entry, dict):
        raise corrupt(label, "its header entry is not an object", name)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise corrupt(label, f"its dtype {dtype!r} is unknown", name)
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise corrupt(label, "its shape or offsets are not counts", name)
    start, end = offsets
    if not start <= end <= room or end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise corrupt(
            label, f"its bytes {start}..{end} do not fit {dtype} {shape} in a file of {room} data bytes", name
        )
    return StoredTensor(file, base + start, dtype, tuple(shape), None), end


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)


def _bytes(files: Files, file: str, begin: int, count: int) -> bytes:
    data = bytearray(count)
    files.read_into(file, begin, memoryview(data))
    return bytes(data)


def _starts_with(files: Files, file: str, magic: bytes, begin: int = 0) -> bool:
    return files.size(file) >= begin + len(magic) and _bytes(files, file, begin, len(magic)) == magic


class _Archive:
    """One zip archive, read from its central directory."""

    def __init__(self, files: Files, file: str, begin: int, count: int) -> None:
        self.files, self.file, self.begin, self.count = files, file, begin, count
        self.zip = zipfile.ZipFile(io.BufferedReader(_Range(files, file, begin, count), 1 << 16))
        self.entries: dict[str, zipfile.ZipInfo] = {}
        for entry in self.zip.infolist():
            if entry.filename in self.entries:
                raise ValueError(f"it repeats {entry.filename[:100]}")
            self.entries[entry.filename] = entry
        pickles = [name for name in self.entries if name.split("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl")
        self.prefix = pickles[0][: -len("data.pkl")]
        self.storages: dict[str, _Storage] = {}
        self.repeated_bytes = 0

    def load(self) -> Any:
        order = self.entries.get(f"{self.prefix}byteorder")
        if order is not None and self._content(order, 16) != b"little":
            raise ValueError("its byte order is not little-endian")
        entry = self.entries[f"{self.prefix}data.pkl"]
        data = self._content(entry, MAX_METADATA_BYTES)
        self.check(entry, data)
        return unpickle(data, self._storage, self._builders())

    def _content(self, entry: zipfile.ZipInfo, limit: int) -> bytes:
        start = self.start(entry)
        if entry.file_size > limit:
            raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
        return _bytes(self.files, self.file, start, entry.file_size)

    def start(self, entry: zipfile.ZipInfo) -> int:
        """First byte of the entry's content in the file."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{entry.filename[:100]} is compressed")
        at = self.begin + entry.header_offset
        if not self.begin <= at <= self.begin + self.count - _LOCAL_HEADER_BYTES:
            raise ValueError(f"{entry.filename[:100]} lies outside")
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        room = min(_LOCAL_HEADER_BYTES + len(name), self.begin + self.count - at)
        header = _bytes(self.files, self.file, at, room)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:_LOCAL_HEADER_BYTES])
        start = at + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if header[:4] != b"PK\x03\x04" or start + entry.file_size > self.begin + self.count:
            raise ValueError(f"{entry.filename[:100]} lies outside")
        if name_bytes != len(name) or header[_LOCAL_HEADER_BYTES:] != name:
            raise ValueError(f"{entry.filename[:100]} has another name where it lies")
        return int(start)

    def check(self, entry: zipfile.ZipInfo, data: bytes) -> None:
        """Raises `CorruptCheckpoint` unless the entry's content has its CRC-32 (0 = was written without)."""
        if entry.CRC and isal_zlib.crc32(data) != entry.CRC:
            raise corrupt(self.files.label(self.file), f"record {entry.filename[:100]} does not match its CRC-32")

    def _storage(self, identity: Any) -> _Storage:
        """A persistent id: `("storage", type, key, location, elements)`."""
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise PickleError("a persistent id is not a storage")
        _, kind, key, _, elements = identity
        dtype = _STORAGES.get(kind.name) if isinstance(kind, Name) and kind.module.startswith("torch") else None
        if dtype is None or not isinstance(key, str) or type(elements) is not int:
            raise PickleError(f"a storage of type {kind} is unknown")
        known = self.storages.get(key)
        if known is None:
            entry = self.entries.get(f"{self.prefix}data/{key}")
            if entry is None:
                raise PickleError(f"storage {key[:50]} is missing")
            known = self.storages[key] = _Storage(self.start(entry), entry.file_size, dtype)
            if entry.file_size <= NUMBER_BYTES:
                self.check(entry, _bytes(self.files, self.file, known.begin, entry.file_size))
        if elements * ITEM_BYTES[dtype] > known.size_bytes:
            raise PickleError(f"storage {key[:50]} has {known.size_bytes} bytes, too few for {elements} elements")
        return _Storage(known.begin, known.size_bytes, dtype)

    def _builders(self) -> dict[str, Any]:
        return {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_with_dtype,
            "torch._utils._rebuild_parameter": lambda data, *rest: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
            "torch._tensor._rebuild_from_type_v2": self._from_type,
            "torch.nn.parameter.Parameter": lambda data, *rest: data,
            "torch.nn.parameter.Buffer": lambda data, *rest: data,
        }

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
        if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
            raise PickleError("a tensor has no storage")
        shape, strides = _extents(shape), _extents(strides)
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            raise PickleError(f"a tensor of shape {shape} has strides {strides}")
        item = ITEM_BYTES[storage.dtype]
        empty = 0 in shape
        reach = 0 if empty else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if (offset + reach) * item > storage.size_bytes and not empty:
            raise PickleError(
                f"a tensor of shape {list(shape)} reaches beyond its storage of {storage.size_bytes} bytes"
            )
        size_bytes = math.prod(shape) * item
        if size_bytes > storage.size_bytes:  # the same elements again and again, by strides of 0
            self.repeated_bytes += size_bytes
            if self.repeated_bytes > MAX_REPEATED_BYTES:
                raise PickleError(
                    f"a tensor of shape {list(shape)[:8]} repeats a storage of {storage.size_bytes} bytes too often"
                )
        plain = empty or is_row_major(shape, strides)
        begin = storage.begin if empty else storage.begin + offset * item
        return StoredTensor(self.file, begin, storage.dtype, shape, None if plain else strides)

    def _tensor_with_dtype(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
    ) -> StoredTensor:
        name = TORCH_DTYPES.get(dtype.name) if isinstance(dtype, Name) else None
        if name is None or not isinstance(storage, _Storage):
            raise PickleError(f"a tensor has the dtype {dtype}")
        return self._tensor(_Storage(storage.begin, storage.size_bytes, name), offset, shape, strides)

    def _from_type(self, builder: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor with attributes is that tensor; a subclass stays a record of what it is made of."""
        name, args = (
            builder if isinstance(builder, Name) else Name("", "?"),
            args if isinstance(args, tuple) else (args,),
        )
        if str(kind) in _PLAIN_TENSORS and str(name) in _PLAIN_BUILDERS:
            return self._builders()[str(name)](*args)
        return Record(name, args)


def _extents(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(one) is int and 0 <= one < 2**63 for one in value):
        raise PickleError("a tensor's shape or strides are not counts")
    return value


class _Range(io.RawIOBase):
    """Part of a file as a stream, for `zipfile`."""

    def __init__(self, files: Files, file: str, begin: int, count: int) -> None:
        self._files, self._file, self._begin, self._count, self._at = files, file, begin, count, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._count}[whence]
        if base + offset < 0:
            raise ValueError(f"it is too short ({self._count} bytes)")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        count = max(0, min(target.nbytes, self._count - self._at))
        self._files.read_into(self._file, self._begin + self._at, target[:count])
        self._at += count
        return count


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], StoredTensor]]:
    """All tensors in nested dicts, lists and tuples with the keys that lead to them."""
    if isinstance(value, StoredTensor):
        yield path, value
    elif isinstance(value, dict):
        for key, member in value.items():
            yield from walk(member, (*path, key))
    elif isinstance(value, list | tuple):
        for index, member in enumerate(value):
            yield from walk(member, (*path, index))
