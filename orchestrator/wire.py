"""Core types <-> JSON: one codec for HTTP, the journal and the CRD's status.

Dataclasses become objects with their field names; unions of dataclasses carry the class name under `type`. Unknown
fields are ignored and missing ones take their default, so that a newer agent can talk to an older controller within
one `VERSION`; anything else that does not fit raises `InvalidInput`.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, TypeVar, get_args

from cattrs import Converter
from cattrs.errors import BaseValidationError, StructureHandlerNotFoundError
from cattrs.strategies import configure_tagged_union
from cattrs.v import transform_error

from orchestrator.core.errors import InvalidInput

VERSION = 1
"""Version of the messages; raised when an old reader could misread a new message."""

T = TypeVar("T")


@cache
def _converter() -> Converter:
    return Converter(omit_if_default=False)


@cache
def _union_converter(union: Any) -> Converter:
    converter = Converter()
    configure_tagged_union(union, converter, tag_name="type")
    return converter


def to_data(value: Any, union: Any = None) -> Any:
    """JSON-able form of a core object; give the `union` it belongs to where the reader must tell its members apart."""
    if union is not None and get_args(union):
        return _union_converter(union).unstructure(value, unstructure_as=union)
    return _converter().unstructure(value)


def from_data(data: Any, kind: Any) -> Any:
    """Core object of type (or union) `kind` from its JSON-able form; raises `InvalidInput` naming the field."""
    converter = _union_converter(kind) if get_args(kind) else _converter()
    try:
        return converter.structure(data, kind)
    except (BaseValidationError, StructureHandlerNotFoundError) as error:
        raise InvalidInput(f"message does not fit {kind}: {'; '.join(transform_error(error))}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InvalidInput(f"message does not fit {kind}: {error!r}") from error


def dumps(value: Any, union: Any = None) -> str:
    """One line of JSON."""
    return json.dumps(to_data(value, union), separators=(",", ":"))


def loads(text: str | bytes, kind: Any) -> Any:
    """Inverse of `dumps`; raises `InvalidInput` when the text is not JSON or does not fit `kind`."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"message is not JSON: {error}") from error
    return from_data(data, kind)


def pack(**body: Any) -> str:
    """A versioned message: `pack(report=report)` -> `{"v": 1, "report": {...}}`."""
    return json.dumps({"v": VERSION} | {name: to_data(value) for name, value in body.items()}, separators=(",", ":"))


def unpack(text: str | bytes, name: str, kind: type[T]) -> T:
    """The `name` of a message made by `pack`; raises `InvalidInput` on another version or a misfit."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"message is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("v") != VERSION:
        found = data.get("v") if isinstance(data, dict) else None
        raise InvalidInput(f"message has version {found!r} but this side speaks {VERSION}: run one regrow everywhere")
    if name not in data:
        raise InvalidInput(f"message lacks {name!r}")
    unpacked: T = from_data(data[name], kind)
    return unpacked
