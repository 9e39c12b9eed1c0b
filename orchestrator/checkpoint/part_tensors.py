"""What one rank holds of each tensor, as columns of numbers. <-> the columns of its part manifest, in JSON.

    "parameters": ["w", ...]                                    each name once
    "forms":   {"state": [null, "exp_avg"], "kind": [...], "dtype": [...], "shape": [[4, 4], ...]}
    "boxes":   {"offsets": [[0, 0], ...], "sizes": [[2, 4], ...]}
    "tensors": {"parameter": [0, 0], "form": [0, 1], "chunks": [1, 2]}    numbers of the above, and how many chunks
    "chunks":  {"box": [0, 0, 1], "begin": [80, 112, 128], "digest": [...]}    tensor by tensor

A chunk ends where its box and dtype say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from operator import add
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from orchestrator.checkpoint.columns import DIGEST_BYTES, Boxes
from orchestrator.checkpoint.fields import LARGEST, Fields, short
from orchestrator.checkpoint.layout import ITEM_BYTES, KINDS, MAX_DIMENSIONS, Box, tensor_name
from orchestrator.checkpoint.rows import Column, Rows

LARGEST_CHUNK_BYTES = 1 << 62
"""No chunk is larger: half of `LARGEST`, so that a product in floating point tells which are not."""
HEX = frozenset("0123456789abcdef")
MEMBERS = ("parameters", "forms", "boxes", "tensors", "chunks")
"""What `part_tensors` reads, every value of it."""
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class PartChunk:
    """A box at bytes `begin .. end` of the data file."""

    box: Box
    begin: int
    end: int
    digest: str


@dataclass(frozen=True, slots=True)
class PartTensor:
    """What one rank holds of one logical tensor: no chunk at all where its boxes are empty."""

    parameter: str
    state: str | None
    kind: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[PartChunk, ...]

    @property
    def name(self) -> str:
        """Name of the logical tensor."""
        return tensor_name(self.parameter, self.state)


class Form(NamedTuple):
    """All that many tensors have in common. A rank of a large model has thousands of tensors of a few dozen forms."""

    state: str | None
    kind: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind} of {self.dtype} {list(self.shape)}"


@dataclass(frozen=True, eq=False)
class PartTensors(Sequence[PartTensor]):
    """The tensors of a part manifest that was read, every one of them checked; objects are made when asked for.

    Invariant: names are unique; every chunk has a box with elements inside its tensor.
    """

    parameters: Sequence[str]
    forms: Sequence[Form]
    boxes: Boxes
    names: Sequence[str]
    """Of each logical tensor, as all that follows up to `counts`."""
    parameter: Column
    form: Column
    counts: Column
    """How many chunks it has."""
    owner: Column
    """Number of each chunk's tensor; ascending, as chunks are listed tensor by tensor."""
    box: Column
    begin: Column
    end: Column
    digests: bytes
    """`DIGEST_BYTES` for each chunk."""

    @cached_property
    def _starts(self) -> list[int]:
        starts: list[int] = (np.cumsum(self.counts) - self.counts).tolist()
        return starts

    def __len__(self) -> int:
        return len(self.form)

    @overload
    def __getitem__(self, at: int) -> PartTensor: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[PartTensor, ...]: ...

    def __getitem__(self, at: int | slice) -> PartTensor | tuple[PartTensor, ...]:
        found = range(len(self))[at]
        return self._tensor(found) if isinstance(found, int) else tuple(map(self._tensor, found))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def _tensor(self, at: int) -> PartTensor:
        first = self._starts[at]
        chunks = tuple(map(self._chunk, range(first, first + int(self.counts[at]))))
        return PartTensor(self.parameters[int(self.parameter[at])], *self.forms[int(self.form[at])], chunks)

    def _chunk(self, at: int) -> PartChunk:
        digest = self.digests[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES].hex()
        return PartChunk(self.boxes[int(self.box[at])], int(self.begin[at]), int(self.end[at]), digest)


# ---------------------------------------------------------------- writing


def part_data(tensors: Iterable[PartTensor]) -> dict[str, Any]:
    """The members of a part manifest's JSON that describe these tensors."""
    parameters: dict[str, int] = {}
    forms: dict[Form, int] = {}
    boxes: dict[Box, int] = {}
    listed: dict[str, list[int]] = {"parameter": [], "form": [], "chunks": []}
    chunks: list[PartChunk] = []
    for one in tensors:
        listed["parameter"].append(_number(parameters, one.parameter))
        listed["form"].append(_number(forms, Form(one.state, one.kind, one.dtype, one.shape)))
        listed["chunks"].append(len(one.chunks))
        chunks += one.chunks
    held = {
        "box": [_number(boxes, chunk.box) for chunk in chunks],
        "begin": [chunk.begin for chunk in chunks],
        "digest": [chunk.digest for chunk in chunks],
    }
    return {
        "parameters": list(parameters),
        "forms": {key: [getattr(form, key) for form in forms] for key in Form._fields},
        "boxes": {"offsets": [box.offsets for box in boxes], "sizes": [box.sizes for box in boxes]},
        "tensors": listed,
        "chunks": held,
    }


def _number(known: dict[Key, int], key: Key) -> int:
    return known.setdefault(key, len(known))


# ---------------------------------------------------------------- reading


def part_tensors(fields: Fields) -> PartTensors:
    """What a part manifest says of its tensors; raises `CorruptCheckpoint` for whatever does not hold together.

    That the chunks tile their file is for the caller to see.
    """
    parameters, (forms, shapes), boxes = fields.texts("parameters"), _forms(fields), _boxes(fields)
    parameter, form, counts = _tensors(
        fields.object("tensors", "parameter", "form", "chunks"), len(parameters), len(forms)
    )
    box, begin, digests = _chunks(fields.object("chunks", "box", "begin", "digest"), len(boxes.offsets))
    if counts.max(initial=0) > len(box) or counts.sum() != len(box):  # the first, lest the sum be beyond 64 bits
        raise fields.fail(f"its tensors do not have the {len(box)} chunks that it lists")
    names = _names(parameters, forms, parameter, form)
    owner = np.repeat(np.arange(len(names)), counts)
    places = _Places(fields, names, owner)
    _check_forms(places, forms, form)
    _check_names(places)
    end = begin + _sizes_bytes(places, forms, shapes, form[owner], boxes, box, begin)
    raw = _digests(places, digests)
    return PartTensors(parameters, forms, boxes, names, parameter, form, counts, owner, box, begin, end, raw)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where in a part manifest something is wrong."""

    fields: Fields
    names: Sequence[str]
    owner: Column

    def of_chunk(self, at: int) -> Fields:
        """The fields, with errors that name the tensor of this chunk."""
        return self.fields.of(self.names[self.owner[at]])


def _forms(fields: Fields) -> tuple[list[Form], Rows]:
    columns = fields.object("forms", *Form._fields)
    states, kinds, dtypes = columns.optional_texts("state"), columns.texts("kind"), columns.texts("dtype")
    shapes = columns.rows("shape")
    _require_equal_lengths(columns, "forms", states, kinds, dtypes, shapes)
    return list(map(Form, states, kinds, dtypes, map(tuple, shapes.lists))), shapes


def _boxes(fields: Fields) -> Boxes:
    columns = fields.object("boxes", "offsets", "sizes")
    offsets, sizes = columns.rows("offsets"), columns.rows("sizes")
    _require_equal_lengths(columns, "boxes", offsets, sizes)
    unequal = np.flatnonzero(offsets.lengths != sizes.lengths)
    if unequal.size:
        one, other = (short(list(rows.lists[unequal[0]])) for rows in (offsets, sizes))
        raise columns.fail(f"box {unequal[0]} has the offsets {one} but the sizes {other}")
    return Boxes(offsets, sizes)


def _tensors(columns: Fields, parameters: int, forms: int) -> tuple[Column, Column, Column]:
    found = _below(columns, "parameter", parameters), _below(columns, "form", forms), columns.column("chunks")
    _require_equal_lengths(columns, "tensors", *found)
    return found


def _chunks(columns: Fields, boxes: int) -> tuple[Column, Column, list[str]]:
    found = _below(columns, "box", boxes), columns.column("begin"), columns.texts("digest")
    _require_equal_lengths(columns, "chunks", *found)
    return found


def _below(columns: Fields, key: str, end: int) -> Column:
    found = columns.column(key)
    if len(found) and found.max() >= end:
        raise columns.fail(f"{key} holds {found.max()} where a number below {end} is expected")
    return found


def _require_equal_lengths(columns: Fields, name: str, *found: Sized) -> None:
    if len({len(one) for one in found}) > 1:
        raise columns.fail(f"the columns of its {name} have {', '.join(str(len(one)) for one in found)} members")


def _names(parameters: Sequence[str], forms: Sequence[Form], parameter: Column, form: Column) -> list[str]:
    """As `tensor_name` makes them; without a loop in Python, as there may be a million."""
    endings = ["" if one.state is None else f".{one.state}" for one in forms]
    owners = map(parameters.__getitem__, parameter.tolist())
    return list(map(add, owners, map(endings.__getitem__, form.tolist())))


def _check_names(places: _Places) -> None:
    if len(set(places.names)) == len(places.names):
        return
    seen: set[str] = set()
    for name in places.names:
        if name in seen:
            raise places.fields.of(name).fail("it is listed twice")
        seen.add(name)


def _check_forms(places: _Places, forms: Sequence[Form], form: Column) -> None:
    for number, one in enumerate(forms):
        if reason := _misfit(one):
            users = np.flatnonzero(form == number)
            raise (places.fields.of(places.names[users[0]]) if len(users) else places.fields).fail(reason)


def _misfit(form: Form) -> str | None:
    if form.kind not in KINDS or (form.kind == "state") != (form.state is not None):
        return f"kind {form.kind!r} does not fit"
    if form.dtype not in ITEM_BYTES:
        return f"dtype {form.dtype!r} is unknown"
    return f"it has {len(form.shape)} dimensions" if len(form.shape) > MAX_DIMENSIONS else None


def _sizes_bytes(
    places: _Places, forms: Sequence[Form], shapes: Rows, form: Column, boxes: Boxes, box: Column, begin: Column
) -> Column:
    """Bytes of each chunk, of these forms; raises `CorruptCheckpoint` where its box is not inside its tensor, has no
    elements, or its bytes end where no file does.
    """
    item_bytes = np.array([ITEM_BYTES[one.dtype] for one in forms], np.int64)[form]
    dimensions = boxes.offsets.lengths[box]
    outside = dimensions != shapes.lengths[form]
    found: Column = np.zeros(len(form), np.int64)
    for length in np.flatnonzero(np.bincount(dimensions[~outside])).tolist():
        here = np.flatnonzero(~outside & (dimensions == length))
        offsets, sizes = boxes.taken(box[here], length)
        outside[here] = (sizes > shapes.taken(form[here], length) - offsets).any(axis=1)
        about = sizes.astype(np.float64).prod(axis=1) * item_bytes[here]  # the exact product may be beyond 64 bits
        found[here] = np.where(about < LARGEST_CHUNK_BYTES, sizes.prod(axis=1) * item_bytes[here], 0)
    for at in np.flatnonzero(outside)[:1].tolist():
        words = f"offsets {short(list(boxes[box[at]].offsets))} and sizes {short(list(boxes[box[at]].sizes))}"
        raise places.of_chunk(at).fail(f"a chunk with {words} is outside {short(list(forms[form[at]].shape))}")
    for at in np.flatnonzero((found < 1) | (begin > LARGEST - found))[:1].tolist():
        raise places.of_chunk(at).fail(f"chunk {boxes[box[at]]} at byte {begin[at]} is empty or larger than any file")
    return found


def _digests(places: _Places, digests: Sequence[str]) -> bytes:
    if set(map(len, digests)) <= {2 * DIGEST_BYTES}:
        joined = "".join(digests)
        with suppress(ValueError):  # told below
            found = bytes.fromhex(joined)
            if found.hex() == joined:  # `fromhex` also takes spaces and capitals
                return found
    at = next(at for at, one in enumerate(digests) if len(one) != 2 * DIGEST_BYTES or not set(one) <= HEX)
    raise places.of_chunk(at).fail(f"digest is {short(digests[at])} where a checksum is expected")
