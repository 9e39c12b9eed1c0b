"""Shards of ranks to whole tensors: the bytes of the files, through the view, are the bytes of the tensor."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.language import (
    Average,
    Expert,
    Flat,
    Fragment,
    Padding,
    Pattern,
    Replicated,
    Rule,
    Shard,
    Unique,
    merge,
)
from orchestrator.checkpoint.layout import Box, Chunk, LogicalTensor, flat_boxes
from orchestrator.checkpoint.merging import select
from orchestrator.checkpoint.reshard import flaw
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint

Array = np.ndarray[Any, np.dtype[Any]]
QUICK = settings(max_examples=150, deadline=None)


def stored(folder: Path, array: Array, how: str, cuts: Sequence[int] = ()) -> Shard:
    """One rank's shard in files: whole, its transpose, as a torch.save archive, inline, or in flat pieces."""
    file = f"rank-{len(list(folder.iterdir()))}"
    whole = Box.whole(array.shape)
    if how == "blob":
        torch.save(torch.from_numpy(array.copy()), folder / file)
        return Shard(array.shape, (Chunk(whole, file, 0, blob_bytes=(folder / file).stat().st_size),))
    if how == "inline":
        return Shard(array.shape, (Chunk(whole, "", 0, data=array.tobytes()),))
    if how == "transposed":
        (folder / file).write_bytes(b"junk" + array.T.tobytes())
        strides = tuple(stride // array.itemsize for stride in np.ascontiguousarray(array.T).T.strides)
        return Shard(array.shape, (Chunk(whole, file, 4, strides=strides),))
    (folder / file).write_bytes(array.tobytes())
    if how == "whole":
        return Shard(array.shape, (Chunk(whole, file, 0),))
    edges = [0, *sorted(cut % (array.size + 1) for cut in cuts), array.size]
    chunks = [
        Chunk(box, file, (start + before) * array.itemsize)
        for start, end in itertools.pairwise(edges)
        for before, box in flat_boxes(array.shape, start, end - start)
    ]
    return Shard(array.shape, tuple(chunks))


def read(folder: Path, tensor: LogicalTensor, dtype: Any = np.float32) -> Array:
    assert tensor.average or flaw(tensor.shape, [chunk.box for chunk in tensor.chunks]) is None
    view = UniversalView(LocalFiles(folder), step=1, generation=0, state={}, tensors={tensor.name: tensor})
    out = np.zeros(tensor.shape, dtype)
    view.read(tensor.name, Box.whole(tensor.shape), out)
    return out


def merged(rule: Rule | Pattern, shards: Sequence[Shard], state: str | None = None, **more: Any) -> LogicalTensor:
    rule = rule if isinstance(rule, Rule) else Rule("w", rule)
    return merge("w", "w", state, "state" if state else "parameter", "F32", rule, shards, **more)


@st.composite
def splits(draw: st.DrawFn) -> tuple[tuple[int, ...], int, list[list[int]], int]:
    """Shape, dimension, widths of every rank in every section, elements of padding."""
    ranks, sections = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    widths = [[draw(st.integers(0, 4)) for _ in range(ranks)] for _ in range(sections)]
    widths[0][0] += 1
    before, after = draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.lists(st.integers(1, 3), max_size=1))
    total = sum(map(sum, widths))
    return (*before, total, *after), len(before), widths, draw(st.integers(0, total - 1))


@QUICK
@given(splits(), st.data())
def test_any_split_over_ranks_is_undone(
    case: tuple[tuple[int, ...], int, list[list[int]], int], data: st.DataObject
) -> None:
    shape, dim, widths, padding = case
    tensor = np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)
    starts = np.cumsum([0, *(width for section in widths for width in section)])
    parts = np.split(tensor, starts[1:-1], axis=dim)
    ranks = len(widths[0])
    hows = st.sampled_from(["whole", "blob", "inline", "transposed", "pieces"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = []
        for rank in range(ranks):
            array = np.ascontiguousarray(np.concatenate(parts[rank::ranks], axis=dim))
            cuts = data.draw(st.lists(st.integers(0, 100), max_size=3))
            shards.append(stored(folder, array, data.draw(hows), cuts))
        kept = shape[dim] - padding
        given_dim = data.draw(st.sampled_from([dim, dim - len(shape)]))
        sections = tuple(map(sum, widths)) if data.draw(st.booleans()) else ()
        fragment = Fragment(given_dim, sections, widths=tuple(map(tuple, widths)))
        out = merged(Rule("w", fragment, Padding(kept, given_dim)), shards)
        assert out.shape == (*shape[:dim], kept, *shape[dim + 1 :])
        np.testing.assert_array_equal(read(folder, out), np.take(tensor, range(kept), axis=dim))


@QUICK
@given(
    st.lists(st.integers(1, 4), min_size=0, max_size=3), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.data()
)
def test_a_flattened_tensor_is_undone(shape: list[int], widths: list[int], data: st.DataObject) -> None:
    tensor = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    flat = np.concatenate([tensor.ravel(), np.full(data.draw(st.integers(0, 5)), np.nan, np.float32)])
    widths[-1] += max(0, len(flat) - sum(widths))
    flat = np.concatenate([flat, np.full(sum(widths) - len(flat), np.nan, np.float32)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = [
            stored(folder, part, data.draw(st.sampled_from(["whole", "inline", "pieces", "blob"])), [3, 5])
            for part in np.split(flat, np.cumsum(widths)[:-1])
        ]
        np.testing.assert_array_equal(read(folder, merged(Flat(), shards, shape=tuple(shape))), tensor)


def test_no_byte_is_copied_and_contiguous_chunks_stay_so(tmp_path: Path) -> None:
    shards = [Shard((4, 3), (Chunk(Box.whole((4, 3)), f"f{rank}", 100, digest="d"),)) for rank in range(2)]
    out = merged(Fragment(0, count=2), shards)
    assert out.chunks == (
        Chunk(Box((0, 0), (2, 3)), "f0", 100),
        Chunk(Box((4, 0), (2, 3)), "f0", 124),
        Chunk(Box((2, 0), (2, 3)), "f1", 100),
        Chunk(Box((6, 0), (2, 3)), "f1", 124),
    )
    out = merged(Fragment(1, (4, 2)), shards=[Shard((4, 3), shard.chunks) for shard in shards])
    assert out.chunks[1] == Chunk(Box((0, 4), (4, 1)), "f0", 108, strides=(3, 1))
    assert merged(Fragment(1), shards).chunks[1] == shards[1].chunks[0].moved(Box((0, 3), (4, 3)))


def test_uneven_shards_say_the_widths_of_one_section(tmp_path: Path) -> None:
    tensor = np.arange(20, dtype=np.float32).reshape(10, 2)
    shards = [stored(tmp_path, part, "whole") for part in np.split(tensor, [4, 7])]
    np.testing.assert_array_equal(read(tmp_path, merged(Fragment(), shards)), tensor)
    np.testing.assert_array_equal(read(tmp_path, merged(Expert(), shards)), tensor)


def test_uneven_shards_of_several_sections_in_proportion(tmp_path: Path) -> None:
    """Six query groups over ranks with 3, 2 and 1 of them: queries twice as wide as keys and values."""
    q, k = np.arange(12, dtype=np.float32), np.arange(6, dtype=np.float32) + 50
    shards = [
        stored(tmp_path, np.concatenate([q[2 * a : 2 * b], k[a:b], -k[a:b]]), "whole")
        for a, b in [(0, 3), (3, 5), (5, 6)]
    ]
    expected = np.concatenate([q, k, -k])
    np.testing.assert_array_equal(read(tmp_path, merged(Fragment(0, (12, 6, 6)), shards)), expected)


def test_copies_of_ranks(tmp_path: Path) -> None:
    shards = [stored(tmp_path, np.full((2, 2), value, np.float32), "whole") for value in (1, 2, 6)]
    same = merged(Replicated(), shards)
    assert same.others == (shards[1].chunks, shards[2].chunks)
    assert not same.average
    assert (read(tmp_path, same) == 1).all()
    mean = merged(Average(), shards)
    assert mean.average
    assert (read(tmp_path, mean) == 3).all()
    assert (read(tmp_path, merged(Rule("w", Average(), Padding(1, 1)), shards)) == np.full((2, 1), 3)).all()


def test_scalar_states_and_steps_are_the_same_everywhere(tmp_path: Path) -> None:
    scalars = [stored(tmp_path, np.array(7, np.float32), "inline") for _ in range(2)]
    assert merged(Rule("w", Fragment(0), Padding(3)), scalars, "power").shape == ()
    steps = [stored(tmp_path, np.array([7], np.float32), "whole") for _ in range(2)]
    for pattern in (Average(), Fragment(0), Unique()):
        out = merged(pattern, steps, "step")
        assert (out.shape, out.others, out.average) == ((1,), (steps[1].chunks,), False)
        assert out.rule == "the same on every rank: the first rank's copy"
    assert merged(Fragment(0), steps, "exp_avg").shape == (2,)


def test_the_rule_is_kept_in_words(tmp_path: Path) -> None:
    shards = [stored(tmp_path, np.zeros((4, 2), np.float32), "whole")] * 2
    assert merged(Rule("w", Fragment(0, count=2), Padding(7)), shards).rule == (
        "split along dimension 0 in rank order, each of 2 equal sections on its own, "
        "padding beyond 7 along dimension 0 left out"
    )


@pytest.mark.parametrize(
    ("rule", "shapes", "message"),
    [
        (Replicated(), [(2, 2), (2, 3)], "rank 1 holds the shape [2, 3] but rank 0 [2, 2]"),
        (Average(), [(2,), (2, 1)], "rank 1 holds the shape [2, 1] but rank 0 [2]"),
        (Unique(), [(2,), (2,)], "2 ranks hold it"),
        (Unique(), [], "no rank holds it"),
        (Fragment(2), [(2, 2)], "its shape [2, 2] has no dimension 2"),
        (Fragment(0), [()], "its shape [] has no dimension 0"),
        (Fragment(0), [(2, 2), (2, 3)], "differ in more than dimension 0"),
        (Fragment(0), [(2, 2), (2,)], "differ in more than dimension 0"),
        (Fragment(0, (3, 2)), [(2,), (2,)], "its sections 3+2 are not the 4 elements that the ranks hold"),
        (Fragment(0, count=2), [(2,), (3,)], "5 elements do not make 2 equal sections"),
        (Fragment(0, (3, 3)), [(5,), (1,)], "the ranks hold 5+1, of which no whole shares of the section of 3"),
        (Fragment(0, widths=((1, 1),)), [(1,), (2,)], "its widths give the ranks 1+1 elements but they hold 1+2"),
        (Fragment(0, widths=((1,),)), [(1,), (2,)], "its widths are not 2 sizes per section"),
        (Fragment(0, (2, 1), widths=((1, 2),)), [(1,), (2,)], "its widths add up to other sections than 2+1"),
        (Flat(), [(2,)], "the shape of the whole tensor is not known"),
        (Rule("w", Fragment(0), Padding(9)), [(4,), (4,)], "the ranks hold 8 elements along dimension 0, fewer than 9"),
        (Rule("w", Fragment(0), Padding("{v}")), [(4,)], "its padding has a variable that the checkpoint does not say"),
    ],
)
def test_shards_that_do_not_fit(rule: Any, shapes: list[tuple[int, ...]], message: str) -> None:
    shards = [Shard(shape, (Chunk(Box.whole(shape), "f", 0),)) for shape in shapes]
    with pytest.raises(CheckpointError, match=r"^w does not fit the rule 'w'") as raised:
        merged(rule, shards)
    assert message in str(raised.value)


def test_flat_shards_that_do_not_fit() -> None:
    short = [Shard((3,), (Chunk(Box.whole((3,)), "f", 0),))]
    with pytest.raises(CheckpointError, match=r"the ranks hold 3 elements but its shape \[2, 2\] has 4"):
        merged(Flat(), short, shape=(2, 2))
    with pytest.raises(CheckpointError, match="not every rank holds one dimension"):
        merged(Flat(), [Shard((3, 1), ())], shape=(3,))


@QUICK
@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_layers_are_selected_of_a_stack(layers: int, sections: int, data: st.DataObject) -> None:
    tensor = np.arange(layers * sections * 6, dtype=np.float32).reshape(layers, 2 * sections, 3)
    hows = st.sampled_from(["whole", "blob", "inline", "transposed", "pieces"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = [
            stored(folder, np.ascontiguousarray(part), data.draw(hows), [4]) for part in np.split(tensor, 2, axis=1)
        ]
        whole = merged(Fragment(1, count=sections), shards)
        rows = np.concatenate([tensor[:, :sections], tensor[:, sections:]], axis=1)
        halves = [np.split(half, sections, axis=1) for half in (rows[:, :sections], rows[:, sections:])]
        expected = np.concatenate([part for pair in zip(*halves, strict=True) for part in pair], axis=1)
        for layer in range(layers):
            chunks = tuple(
                select(chunk, layer, 4)
                for chunk in whole.chunks
                if chunk.box.offsets[0] <= layer < chunk.box.offsets[0] + chunk.box.sizes[0]
            )
            one = LogicalTensor("w", "w", None, "parameter", "F32", whole.shape[1:], chunks)
            np.testing.assert_array_equal(read(folder, one), expected[layer])


def test_parts_of_a_serialised_tensor_that_is_not_row_major_are_refused(tmp_path: Path) -> None:
    torch.save(torch.arange(8.0).reshape(2, 4).T, tmp_path / "t")
    chunk = Chunk(Box.whole((4, 2)), "t", 0, blob_bytes=(tmp_path / "t").stat().st_size)
    np.testing.assert_array_equal(
        read(tmp_path, merged(Fragment(0), [Shard((4, 2), (chunk,))])), np.arange(8.0).reshape(2, 4).T
    )
    with pytest.raises(CorruptCheckpoint, match="with its dimensions exchanged, of which parts are wanted"):
        read(tmp_path, merged(Rule("w", Fragment(0), Padding(3)), [Shard((4, 2), (chunk,))]))


def test_a_part_of_a_serialised_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    shard = stored(tmp_path, np.zeros((4, 2), np.float32), "blob")
    lying = Shard((2, 4), tuple(chunk.moved(Box.whole((2, 4))) for chunk in shard.chunks))
    with pytest.raises(CorruptCheckpoint, match=r"it holds F32 \[4, 2\] where F32 \[2, 4\] is expected"):
        read(tmp_path, merged(Fragment(1, count=2), [lying]))
