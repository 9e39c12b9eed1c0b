"""Strict reading of what other tools pickled: every misfit is a `CorruptCheckpoint` that names file and key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.checkpoint.archive import StoredTensor
from orchestrator.checkpoint.fields import LARGEST, corrupt
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.layout import ITEM_BYTES, MAX_DIMENSIONS
from orchestrator.checkpoint.numbers import PLAIN
from orchestrator.checkpoint.unpickle import Name, Record
from orchestrator.core.errors import CorruptCheckpoint

_SCALARS = {name: dtype for name, dtype in PLAIN.items() if name != "C64"}
"""dtypes of numbers that JSON has, too."""

_MAX_JSON_ITEMS = 1 << 20
_MAX_DEPTH = 50
_MAX_INTEGER = 1 << 64


@dataclass(frozen=True, slots=True)
class Node:
    """A value inside an archive, with the keys that lead to it for errors."""

    value: Any
    label: str
    """How errors name the file."""
    path: str = ""

    def fail(self, reason: str, tensor: str | None = None) -> CorruptCheckpoint:
        """The error to raise for a value that does not fit."""
        return corrupt(self.label, f"{self.path or 'it'} {reason}", tensor)

    def at(self, key: Any) -> Node:
        """A member that has to be there, of a mapping or list."""
        try:
            member = self.value[key]
        except (KeyError, IndexError, TypeError) as error:
            raise self.fail(f"lacks {key}") from error
        return Node(member, self.label, f"{self.path}.{key}" if self.path else str(key))

    def find(self, key: Any) -> Node | None:
        """A member of a mapping; None when it is missing or None."""
        if not isinstance(self.value, dict) or self.value.get(key) is None:
            return None
        return self.at(key)

    def mapping(self) -> dict[Any, Any]:
        """The value, which must be a mapping."""
        if not isinstance(self.value, dict):
            raise self.fail(f"is {short(self.value)} where a mapping is expected")
        return self.value

    def named(self) -> Iterator[tuple[str, Node]]:
        """Members of a mapping whose keys must be names."""
        for key in self.mapping():
            if not isinstance(key, str) or not key:
                raise self.fail(f"has the key {short(key)} where a name is expected")
            yield key, self.at(key)

    def items(self) -> list[Node]:
        """Members of a list or tuple."""
        if not isinstance(self.value, list | tuple):
            raise self.fail(f"is {short(self.value)} where a list is expected")
        return [Node(member, self.label, f"{self.path}[{index}]") for index, member in enumerate(self.value)]

    def count(self) -> int:
        """The value as a count; an enumeration's member stands for its number."""
        value = self.value
        if isinstance(value, Record) and len(value.args) == 1:
            value = value.args[0]
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise self.fail(f"is {short(self.value)} where a count is expected")
        return value

    def shape(self, tensor: str | None = None) -> tuple[int, ...]:
        """The value as a tensor's shape."""
        value = self.value
        if not isinstance(value, list | tuple) or not all(type(one) is int and 0 <= one <= LARGEST for one in value):
            raise self.fail(f"is {short(value)} where a shape is expected", tensor)
        if len(value) > MAX_DIMENSIONS or math.prod(value) > LARGEST:
            raise self.fail(f"is {short(value)}, larger than any tensor", tensor)
        return tuple(value)

    def tensor(self, tensor: str | None = None) -> StoredTensor:
        """The value, which must be a tensor."""
        if not isinstance(self.value, StoredTensor):
            raise self.fail(f"is {short(self.value)} where a tensor is expected", tensor)
        return self.value


def short(value: Any) -> str:
    """The value in few words."""
    if isinstance(value, StoredTensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Record):
        return f"a {value.name}"
    if isinstance(value, dict | list | tuple | set | frozenset) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} items"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def read_scalar(files: Files, stored: StoredTensor) -> int | float | bool:
    """The number in a tensor of one element; raises `CorruptCheckpoint` for dtypes that are no plain numbers."""
    data = bytearray(ITEM_BYTES[stored.dtype])
    files.read_into(stored.file, stored.begin, memoryview(data))
    if stored.dtype == "BF16":
        return float(np.frombuffer(b"\0\0" + data, "<f4")[0])
    if stored.dtype not in _SCALARS:
        raise corrupt(files.label(stored.file), f"a number has the dtype {stored.dtype}")
    found: int | float | bool = np.frombuffer(data, _SCALARS[stored.dtype])[0].item()
    return found


class Plain:
    """Turns values into JSON-able ones; `dropped` lists the keys of what has no such form."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.dropped: list[str] = []
        self._items = 0
        self._depth = 0

    def of(self, node: Node) -> Any:
        """The value of numbers, strings, lists and mappings; tensors of one element become numbers, objects the
        mapping of their attributes. What has no such form becomes None, and its key is noted.
        """
        self._items += 1
        self._depth += 1
        if self._items > _MAX_JSON_ITEMS or self._depth > _MAX_DEPTH:
            raise node.fail("holds more values, or deeper ones, than a checkpoint's settings have")
        try:
            return self._plain(node, node.value)
        finally:
            self._depth -= 1

    def _plain(self, node: Node, value: Any) -> Any:
        if value is None or isinstance(value, bool | float | str):
            return value
        if isinstance(value, int) and abs(value) <= _MAX_INTEGER:
            return value
        if isinstance(value, list | tuple):
            return [self.of(member) for member in node.items()]
        if isinstance(value, set | frozenset):
            return [self.of(Node(one, node.label, node.path)) for one in sorted(value, key=repr)]
        if isinstance(value, dict):
            return self._mapping(node)
        if isinstance(value, Record):
            return self._record(node)
        if isinstance(value, StoredTensor) and value.elements == 1 and value.dtype in (*_SCALARS, "BF16"):
            return read_scalar(self.files, value)
        self._drop(node)
        return None

    def _mapping(self, node: Node) -> dict[str, Any]:
        found = {}
        for key in node.value:
            if not isinstance(key, str | int | float | bool | None):
                self._drop(Node(None, node.label, f"{node.path}.{short(key)}"))
                continue
            name = key if isinstance(key, str) else str(key)
            before = len(self.dropped)
            value = self.of(node.at(key))
            if value is not None or len(self.dropped) == before:
                found[name] = value
        return found

    def _record(self, node: Node) -> Any:
        """An object by its attributes; an enumeration's member by its value."""
        record = node.value
        state = record.state
        if isinstance(state, tuple) and len(state) == 2:  # __dict__ and slots
            state = {**(state[0] or {}), **(state[1] or {})} if _mappings(state) else None
        if isinstance(state, dict):
            return self._mapping(Node(state, node.label, node.path))
        if len(record.args) == 1 and isinstance(record.args[0], bool | int | float | str):
            return record.args[0]
        if record.pairs:
            return self._mapping(Node(record.pairs, node.label, node.path))
        self._drop(node)
        return None

    def _drop(self, node: Node) -> None:
        if not isinstance(node.value, Name):  # a class by name says nothing that could be restored
            self.dropped.append(node.path)


def _mappings(state: tuple[Any, ...]) -> bool:
    return all(part is None or isinstance(part, dict) for part in state)
