"""Numbers of every dtype as numpy has them, bfloat16 and float8 included: for means, differences and rounding."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from orchestrator.checkpoint.layout import ITEM_BYTES
from orchestrator.core.errors import CheckpointError

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

ITEMS: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
"""Bytes per element -> the integers that elements are moved as, so that no bit of them changes."""
PLAIN: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
"""Safetensors' names -> numpy's dtypes, where numpy has one."""
FLOATS = ("F16", "BF16", "F32", "F64")
"""dtypes that are rounded from one to another."""


def numbers(data: Array, dtype: str) -> Array:
    """The numbers in `data` (any array over the bytes of elements of `dtype`), flat; bfloat16 and float8 as fp32."""
    flat = data.reshape(-1).view(np.uint8)
    if dtype in PLAIN:
        return flat.view(PLAIN[dtype])
    if dtype == "BF16":
        return (flat.view("<u2").astype("<u4") << 16).view("<f4")
    if dtype == "F8_E5M2":
        return (flat.astype("<u2") << 8).view("<f2").astype("<f4")
    if dtype == "F8_E4M3":
        return _E4M3[flat]
    raise CheckpointError(f"numbers of dtype {dtype} are not known: convert the tensor before")


def items(values: Array, dtype: str) -> Array:
    """Bytes (uint8, flat) of the numbers rounded to the nearest even of `dtype`, one of `FLOATS`."""
    if dtype == "BF16":
        bits = values.astype("<f4", copy=False).view("<u4")
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).view(np.uint8)
    if dtype not in FLOATS:
        raise CheckpointError(f"tensors are not rounded to dtype {dtype}: choose one of {', '.join(FLOATS)}")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype(PLAIN[dtype])).reshape(-1).view(np.uint8)


def convert(data: Array, source: str, target: str) -> Array:
    """Bytes of elements of `source` as bytes of `target`; raises `CheckpointError` unless both are `FLOATS`."""
    if source not in FLOATS:
        raise CheckpointError(f"tensors of dtype {source} are not converted to {target}: keep their dtype")
    return items(numbers(data, source), target)


def _e4m3() -> Array:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values = np.where((codes & 0x7F) == 0x7F, np.nan, values)
    return np.where(codes & 0x80, -values, values).astype("<f4")


_E4M3 = _e4m3()
assert set(ITEM_BYTES) == {*PLAIN, "BF16", "F8_E5M2", "F8_E4M3"}
