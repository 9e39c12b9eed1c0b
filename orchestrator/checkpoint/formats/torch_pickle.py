"""Pickles of plain values, tensors and the few objects that other tools expect beside them, without importing these.

The counterpart of `orchestrator.checkpoint.unpickle`: protocol 2, as `torch.save` writes it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from orchestrator.checkpoint.archive import TORCH_DTYPES
from orchestrator.checkpoint.layout import ITEM_BYTES, row_major
from orchestrator.checkpoint.unpickle import Name

STORAGES = {
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
"""dtypes -> torch's storages that hold them; tensors of newer dtypes name their dtype themselves."""
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Tensor:
    """All of a storage of the archive as a tensor of this shape."""

    storage: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """What a function or class makes of arguments."""

    name: Name
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An object of a class with these attributes, made without calling its constructor."""

    name: Name
    attributes: dict[str, Any]


def size(shape: tuple[int, ...]) -> Call:
    """A shape as `torch.Size`."""
    return Call(Name("torch", "Size"), (shape,))


def encode(value: Any) -> bytes:
    """The pickle; raises `TypeError` for a value of any other type."""
    return b"\x80\x02" + _value(value) + b"."


def _value(value: Any) -> bytes:
    encoder = _ENCODERS.get(type(value))
    if encoder is None:
        raise TypeError(f"a {type(value).__name__} is not pickled")
    return encoder(value)


def _integer(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) > 255:
        raise TypeError(f"an integer of {len(data)} bytes is not pickled")
    return b"\x8a" + bytes([len(data)]) + data


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _items(values: Any) -> bytes:
    return b"".join(map(_value, values))


def _mapping(value: dict[Any, Any]) -> bytes:
    return b"}(" + b"".join(_value(key) + _value(member) for key, member in value.items()) + b"u"


def _name(value: Name) -> bytes:
    return f"c{value.module}\n{value.name}\n".encode()


def _call(value: Call) -> bytes:
    return _name(value.name) + _value(value.args) + b"R"


def _instance(value: Instance) -> bytes:
    return _name(value.name) + b")\x81" + _mapping(value.attributes) + b"b"


def _tensor(value: Tensor) -> bytes:
    """`_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`, of newer dtypes `_v3` with the dtype."""
    typed = STORAGES.get(value.dtype)
    count = prod(value.shape)
    kind = Name("torch", typed) if typed else Name("torch.storage", "UntypedStorage")
    identity = ("storage", kind, str(value.storage), "cpu", count if typed else count * ITEM_BYTES[value.dtype])
    rest = (0, value.shape, row_major(value.shape), False, Call(Name("collections", "OrderedDict"), ()))
    last = () if typed else (Name("torch", _NAMES[value.dtype]),)
    function = Name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
    return _name(function) + b"(" + _value(identity) + b"Q" + _items((*rest, *last)) + b"tR"


_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"N",
    bool: lambda value: b"\x88" if value else b"\x89",
    int: _integer,
    float: lambda value: b"G" + struct.pack(">d", value),
    str: _text,
    tuple: lambda value: b"(" + _items(value) + b"t",
    list: lambda value: b"](" + _items(value) + b"e",
    dict: _mapping,
    Name: _name,
    Call: _call,
    Instance: _instance,
    Tensor: _tensor,
}
