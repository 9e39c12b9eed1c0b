"""What `torch.save` writes for one tensor, as bytes before and after its elements: so that these can be streamed.

A stored zip archive without checksums, as torch writes it under `set_crc32_options(False)`: `torch.load` reads it,
`weights_only` and `mmap` included; `unzip` would complain.
"""

from __future__ import annotations

import struct
import zlib

from orchestrator.checkpoint.archive import TORCH_DTYPES
from orchestrator.checkpoint.layout import ITEM_BYTES, row_major

ALIGNMENT = 64
"""Bytes: where the elements begin, counted from the archive's first byte, is a multiple of it."""
MAX_BLOB_BYTES = 1 << 31
"""Elements of more bytes would need the large form of zip archives: cut the tensor."""
_TYPED = {
    "BOOL": "BoolStorage",
    "U8": "ByteStorage",
    "I8": "CharStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I16": "ShortStorage",
    "I32": "IntStorage",
    "F32": "FloatStorage",
    "I64": "LongStorage",
    "F64": "DoubleStorage",
    "C64": "ComplexFloatStorage",
}
_NAMES = {name: dtype for dtype, name in TORCH_DTYPES.items()}
_FOLDER = "archive"
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def tensor_blob(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The bytes before and after the row-major elements of a tensor."""
    archive = _Archive()
    archive.add("data.pkl", _pickle(dtype, shape))
    archive.add("byteorder", b"little")
    size_bytes = ITEM_BYTES[dtype]
    for extent in shape:
        size_bytes *= extent
    assert size_bytes <= MAX_BLOB_BYTES, "the caller cuts tensors into chunks"
    before = archive.announce("data/0", size_bytes)
    archive.begin = len(before) + size_bytes
    archive.data = b""
    archive.add("version", b"3\n")
    return before, archive.data + archive.directory()


class _Archive:
    """A zip archive as it grows; `begin` counts the bytes before `data`."""

    def __init__(self) -> None:
        self.begin = 0
        self.data = b""
        self.entries: list[bytes] = []

    def add(self, name: str, content: bytes) -> None:
        self._header(name, len(content), zlib.crc32(content), 0)
        self.data += content

    def announce(self, name: str, size: int) -> bytes:
        """The archive up to where the content of `name` begins, which is not given here."""
        header = 30 + len(f"{_FOLDER}/{name}")
        padding = -(len(self.data) + header + 4) % ALIGNMENT
        self._header(name, size, 0, padding + 4)
        return self.data

    def directory(self) -> bytes:
        entries = b"".join(self.entries)
        start = self.begin + len(self.data)
        return entries + struct.pack(
            "<4s4H2LH", _END, 0, 0, len(self.entries), len(self.entries), len(entries), start, 0
        )

    def _header(self, name: str, size: int, checksum: int, extra_bytes: int) -> None:
        path = f"{_FOLDER}/{name}".encode()
        at = self.begin + len(self.data)
        fields = struct.pack("<5H3L", 0, 0x0800, 0, 0, 0, checksum, size, size)
        # Padding is an extra field of its own kind, as in torch's archives.
        extra = struct.pack("<2sH", b"FB", extra_bytes - 4) + b"Z" * (extra_bytes - 4) if extra_bytes else b""
        self.data += _LOCAL + fields + struct.pack("<2H", len(path), extra_bytes) + path + extra
        lengths = struct.pack("<5H2L", len(path), 0, 0, 0, 0, 0, at)
        self.entries.append(_CENTRAL + struct.pack("<H", 0) + fields + lengths + path)


def _pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    """`torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`, of newer dtypes `_v3`."""
    count = 1
    for extent in shape:
        count *= extent
    typed = _TYPED.get(dtype)
    storage, size = (typed, count) if typed else ("UntypedStorage", count * ITEM_BYTES[dtype])
    where = (
        b"("
        + _text("storage")
        + _name("torch" if typed else "torch.storage", storage)
        + _text("0")
        + _text("cpu")
        + _integer(size)
        + b"tQ"
    )
    hooks = _name("collections", "OrderedDict") + b")R"
    function = _name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
    last = b"" if typed else _name("torch", _NAMES[dtype])
    sizes, strides = _integers(shape), _integers(row_major(shape))
    return b"\x80\x02" + function + b"(" + where + _integer(0) + sizes + strides + b"\x89" + hooks + last + b"tR."


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
