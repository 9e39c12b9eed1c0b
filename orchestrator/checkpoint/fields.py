"""Strict reading of JSON that may be damaged or hostile: every misfit is a `CorruptCheckpoint` that names the file."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from orchestrator.checkpoint.rows import Column, Rows
from orchestrator.core.errors import CorruptCheckpoint

LARGEST = 2**63 - 1
"""No count, offset or length in a checkpoint is larger."""
MAX_DEPTH = 100
"""Objects and lists of JSON within one another: who walks or writes them does so by recursion."""


def corrupt(file: str, reason: str, tensor: str | None = None) -> CorruptCheckpoint:
    """The error for damaged bytes of `file` (and of `tensor` in it)."""
    where = f" at tensor {tensor}" if tensor else ""
    error = CorruptCheckpoint(
        f"checkpoint file {file} is corrupt{where}: {reason}; restore an older checkpoint or another copy of this one"
    )
    error.file, error.reason, error.tensor = file, reason, tensor
    return error


def naming(error: CorruptCheckpoint, tensor: str) -> CorruptCheckpoint:
    """The same error, which names `tensor` unless it names one already."""
    if error.tensor is not None or error.file is None or error.reason is None:
        return error
    return corrupt(error.file, error.reason, tensor)


def parse_object(text: bytes, file: str, typed: Collection[str] = ()) -> Fields:
    """The JSON object in `text`; raises `CorruptCheckpoint` when it is not one, repeats a key or is too deep.

    How deep the members `typed` are is not looked at: the caller asks for every value in them by its type.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise corrupt(file, f"it is not JSON ({type(error).__name__}: {str(error)[:200]})") from error
    if not isinstance(data, dict):
        raise corrupt(file, f"it holds a {type(data).__name__} where an object is expected")
    if _deep([value for key, value in data.items() if key not in typed]):
        raise corrupt(file, f"its values are nested more than {MAX_DEPTH} deep")
    return Fields(data, file)


def _deep(members: list[Any]) -> bool:
    level = [one for one in members if isinstance(one, dict | list)]
    for _ in range(MAX_DEPTH - 1):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [member for some in inner for member in some if isinstance(member, dict | list)]
    return bool(level)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object repeats a key")
    return found


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object whose members are asked for by type; `tensor` is named in errors where known."""

    data: dict[str, Any]
    file: str
    tensor: str | None = None

    def of(self, tensor: str) -> Fields:
        """The same fields, with errors that name `tensor`."""
        return Fields(self.data, self.file, tensor)

    def fail(self, reason: str) -> CorruptCheckpoint:
        """The error to raise for a value that does not fit."""
        return corrupt(self.file, reason, self.tensor)

    def integer(self, key: str) -> int:
        """A count, offset or length: an integer in `0..LARGEST`."""
        value = self._member(key)
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise self.fail(f"{key} is {short(value)} where a count is expected")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of counts."""
        values = self._list(key)
        if not all(type(value) is int and 0 <= value <= LARGEST for value in values):
            raise self.fail(f"{key} is {short(values)} where a list of counts is expected")
        return tuple(values)

    def column(self, key: str) -> Column:
        """A list of counts of any length, in one array."""
        return self._column(key, self._list(key))

    def rows(self, key: str) -> Rows:
        """A list of lists of counts."""
        values = self._list(key)
        if not set(map(type, values)) <= {list}:
            strange = next(value for value in values if type(value) is not list)
            raise self.fail(f"{key} holds {short(strange)} where a list of counts is expected")
        return Rows(values, self._column(key, list(chain.from_iterable(values))))

    def number(self, key: str) -> float:
        """A finite number that is not negative."""
        value = self._member(key)
        if type(value) not in (int, float) or not 0 <= value <= float(LARGEST):
            raise self.fail(f"{key} is {short(value)} where a number is expected")
        return float(value)

    def text(self, key: str) -> str:
        """A string."""
        value = self._member(key)
        if not isinstance(value, str):
            raise self.fail(f"{key} is {short(value)} where a string is expected")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        values = self._list(key)
        if not set(map(type, values)) <= {str}:
            raise self.fail(f"{key} is {short(values)} where a list of strings is expected")
        return values

    def optional_texts(self, key: str) -> list[str | None]:
        """A list of strings and nulls."""
        values = self._list(key)
        if not set(map(type, values)) <= {str, type(None)}:
            raise self.fail(f"{key} is {short(values)} where a list of strings and nulls is expected")
        return values

    def optional_text(self, key: str) -> str | None:
        """A string or null."""
        return None if self._member(key) is None else self.text(key)

    def digest(self, key: str) -> str:
        """An xxh3-128 checksum: 32 lower-case hex digits."""
        value = self.text(key)
        if len(value) != 32 or not set(value) <= set("0123456789abcdef"):
            raise self.fail(f"{key} is {short(value)} where a checksum is expected")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """An object."""
        value = self._member(key)
        if not isinstance(value, dict):
            raise self.fail(f"{key} is {short(value)} where an object is expected")
        return value

    def object(self, key: str, *members: str) -> Fields:
        """An object that has no other members than these."""
        value = self.mapping(key)
        for other in value.keys() - set(members):
            raise self.fail(f"{key} has a member {short(other)}, which is unknown")
        return Fields(value, self.file, self.tensor)

    def objects(self, key: str) -> Iterator[Fields]:
        """A list of objects."""
        for value in self._list(key):
            if not isinstance(value, dict):
                raise self.fail(f"{key} holds {short(value)} where an object is expected")
            yield Fields(value, self.file, self.tensor)

    def expect(self, key: str, value: Any) -> None:
        """The member must be exactly `value`."""
        found = self._member(key)
        if type(found) is not type(value) or found != value:
            raise self.fail(f"{key} is {short(found)} where {value!r} is expected")

    def _member(self, key: str) -> Any:
        if key not in self.data:
            raise self.fail(f"it lacks {key}")
        return self.data[key]

    def _column(self, key: str, values: list[Any]) -> Column:
        """The values, which must be counts: a bool is none, whatever Python says."""
        if set(map(type, values)) <= {int}:
            with suppress(OverflowError):
                column: Column = np.fromiter(values, np.int64, len(values))
                if not values or column.min() >= 0:
                    return column
        strange = next(value for value in values if type(value) is not int or not 0 <= value <= LARGEST)
        raise self.fail(f"{key} holds {short(strange)} where a count is expected")

    def _list(self, key: str) -> list[Any]:
        value = self._member(key)
        if not isinstance(value, list):
            raise self.fail(f"{key} is {short(value)} where a list is expected")
        return value


def short(value: Any) -> str:
    """The value in at most 60 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
