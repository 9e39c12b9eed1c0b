"""Whatever boxes a tensor was saved in, any box of it reads back the same bytes."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint import store
from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.layout import Box, Chunk
from orchestrator.checkpoint.reshard import flaw, plan_copies
from orchestrator.checkpoint.verify import verify
from orchestrator.core.errors import CorruptCheckpoint
from tests.unit.checkpoint.saving import piece

SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)
UNSYNCED = patch("os.fsync", lambda _: None)
"""Durability has tests of its own."""
DTYPES = st.sampled_from([np.uint8, np.uint16, np.float32, np.int64])


def whole(shape: tuple[int, ...], dtype: Any) -> Any:
    """Every element tells its place."""
    return (np.arange(int(np.prod(shape))) % 251).astype(dtype).reshape(shape)


def cut(draw: st.DrawFn, box: Box, depth: int) -> list[Box]:
    """A partition of the box by guillotine cuts, uneven and with empty boxes."""
    if depth == 0 or not box.sizes or draw(st.integers(0, 3)) == 0:
        return [box]
    dim = draw(st.integers(0, len(box.sizes) - 1))
    at = draw(st.integers(0, box.sizes[dim]))
    offsets = (*box.offsets[:dim], box.offsets[dim] + at, *box.offsets[dim + 1 :])
    first = Box(box.offsets, (*box.sizes[:dim], at, *box.sizes[dim + 1 :]))
    second = Box(offsets, (*box.sizes[:dim], box.sizes[dim] - at, *box.sizes[dim + 1 :]))
    return cut(draw, first, depth - 1) + cut(draw, second, depth - 1)


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    return cut(draw, Box.whole(shape), 4)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    return Box(offsets, tuple(draw(st.integers(0, size - start)) for size, start in zip(shape, offsets, strict=True)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box], Box]:
    shape = draw(SHAPES)
    return shape, draw(partitions(shape)), draw(boxes(shape))


@settings(deadline=None, max_examples=300)
@given(cases(), st.data())
def test_copies_write_every_wanted_element_exactly_once(
    case: tuple[tuple[int, ...], list[Box], Box], data: st.DataObject
) -> None:
    shape, partition, wanted = case
    array = whole(shape, np.int64)
    stored = data.draw(st.lists(st.sampled_from(partition), unique=True))  # any part of the chunks, in any order
    target = np.full(wanted.sizes, -1)
    written = np.zeros(wanted.sizes, int)
    plan = plan_copies(wanted, [Chunk(box, "", 0) for box in stored])
    for copy in plan.copies:
        source = array[(*copy.chunk.box.slices, ...)][(*copy.source.slices, ...)]
        target[(*copy.destination.slices, ...)] = source
        written[(*copy.destination.slices, ...)] += 1
    for box in plan.missing:
        written[(*box.relative_to(wanted.offsets).slices, ...)] += 1
    assert (written == 1).all()
    held = np.zeros(shape, bool)
    for box in stored:
        held[(*box.slices, ...)] = True
    expected = np.where(held, array, -1)[(*wanted.slices, ...)]
    assert (target == expected).all()
    assert (flaw(shape, stored) is None) == bool(held.all())


@st.composite
def worlds(draw: st.DrawFn, partition: list[Box]) -> list[list[Box]]:
    """The boxes that each rank saves: every one at least once, replicas on other ranks."""
    world: dict[int, list[Box]] = defaultdict(list)
    size = draw(st.integers(1, 3))
    for box in partition:
        for rank in draw(st.sets(st.integers(0, size - 1), min_size=1)):
            world[rank].append(box)
    return [list({box.offsets: box for box in world[rank] if box.elements}.values()) for rank in range(size)]


def saved(root: Path, array: Any, world: list[list[Box]]) -> store.Committed:
    # An empty box says that the tensor exists, also where no rank holds an element of it.
    nothing = [Box((0,) * array.ndim, (0,) * array.ndim)] if array.ndim else []
    parts = [
        native.write_part(
            root,
            generation=1,
            step=1,
            rank=rank,
            world_size=len(world),
            pieces=[piece("w", array, box) for box in held or nothing],
            state={},
            stall_s=0.0,
        )
        for rank, held in enumerate(world)
    ]
    return store.commit(root, generation=1, step=1, world_size=len(world), parts=parts)


@settings(deadline=None, max_examples=120)
@given(cases(), DTYPES, st.data())
def test_any_partition_reads_back_as_any_box(
    case: tuple[tuple[int, ...], list[Box], Box], dtype: Any, data: st.DataObject
) -> None:
    shape, partition, wanted = case
    array = whole(shape, dtype)
    with tempfile.TemporaryDirectory() as folder, UNSYNCED:
        done = saved(Path(folder), array, data.draw(worlds(partition)))
        view = native.open_view(folder, done.path)
        out = np.full(wanted.sizes, 77, dtype)
        assert view.read("w", wanted, out, check=True) == out.nbytes
        assert out.tobytes() == array[(*wanted.slices, ...)].tobytes()
        runs = view.runs("w", wanted)
        if runs is not None:
            assert b"".join(view.files.span(*run) for run in runs) == out.tobytes()
        assert verify(folder, done.path, threads=1).tensors == 1


@settings(deadline=None, max_examples=40)
@given(cases(), st.data())
def test_a_missing_chunk_is_never_committed(case: tuple[tuple[int, ...], list[Box], Box], data: st.DataObject) -> None:
    shape, partition, _ = case
    solid = [box for box in partition if box.elements]
    if not solid or not shape:
        return
    solid.remove(data.draw(st.sampled_from(solid)))
    missing = pytest.raises(CorruptCheckpoint, match="at tensor w: no chunk holds")
    with tempfile.TemporaryDirectory() as folder, UNSYNCED, missing:
        saved(Path(folder), whole(shape, np.float32), [solid])
