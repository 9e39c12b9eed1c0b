"""Chunks kept as columns of numbers are the very chunks that a list of objects would be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint import columns
from orchestrator.checkpoint.layout import ITEM_BYTES, Box, Chunk, LazyChunks, LogicalTensor
from orchestrator.checkpoint.manifest import PartManifest, data_name, decode_part, encode_part
from orchestrator.checkpoint.part_tensors import PartChunk, PartTensor
from orchestrator.checkpoint.parts import merge_parts
from orchestrator.checkpoint.reshard import flaw, flaw_of, intersect, plan_copies
from orchestrator.core.errors import CorruptCheckpoint
from tests.properties.test_reshard import SHAPES, boxes, partitions

Part = PartManifest[Sequence[PartTensor]]
HEADER_BYTES = 16
FORMS = st.tuples(st.sampled_from(["F32", "U8", "BF16", "I64"]), SHAPES)


@st.composite
def divisions(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes of a tensor: as FSDP divides rows, any partition, or any boxes at all; some missing, some repeated."""
    way = draw(st.integers(0, 4))
    if way == 0 and shape:
        ranks = draw(st.integers(1, 8))
        rows = max(1, -(-shape[0] // ranks))
        found = [
            Box((start, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - start), *shape[1:]))
            for start in range(0, shape[0], rows)
        ]
    elif way == 1:
        found = draw(st.lists(boxes(shape), max_size=4))
    else:
        found = draw(partitions(shape))
    found = [box for box in found if box.elements]
    if found and draw(st.integers(0, 3)) == 0:
        found.remove(draw(st.sampled_from(found)))
    if found:
        found += draw(st.lists(st.sampled_from(found), max_size=3))
    return draw(st.permutations(found)) if draw(st.booleans()) else found


@st.composite
def checkpoints(draw: st.DrawFn) -> list[Part]:
    """The parts of a few ranks; every box of each tensor with any of them, which need not all know the tensor."""
    ranks = draw(st.integers(1, 4))
    held: list[dict[tuple[str, str | None], PartTensor]] = [{} for _ in range(ranks)]
    forms = draw(st.lists(FORMS, min_size=1, max_size=2))
    for index in range(draw(st.integers(0, 4))):
        dtype, shape = draw(st.sampled_from(forms))
        division = draw(divisions(shape))
        owners = [draw(st.integers(0, ranks - 1)) for _ in division]
        for state in draw(st.sampled_from([(None,), (None, "exp_avg"), ("step",), (None, "a.b", "a")])):
            kind = "state" if state else draw(st.sampled_from(["parameter", "buffer"]))
            for rank in range(ranks):
                mine = tuple(
                    PartChunk(box, 0, 0, f"{draw(st.integers(0, 2**128 - 1)):032x}")
                    for box, owner in zip(division, owners, strict=True)
                    if owner == rank
                )
                if mine or draw(st.booleans()):
                    name = f"layers.{index}"
                    held[rank][name, state] = PartTensor(name, state, kind, dtype, shape, mine)
    return [part(rank, ranks, draw(st.permutations(list(tensors.values())))) for rank, tensors in enumerate(held)]


def part(rank: int, ranks: int, tensors: Sequence[PartTensor]) -> Part:
    """A part manifest whose chunks lie in the file widest items first, as writers put them."""
    position, placed = HEADER_BYTES, dict.fromkeys(range(len(tensors)), ())
    for at in sorted(placed, key=lambda at: -ITEM_BYTES[tensors[at].dtype]):
        chunks = []
        for chunk in tensors[at].chunks:
            end = position + chunk.box.elements * ITEM_BYTES[tensors[at].dtype]
            chunks.append(replace(chunk, begin=position, end=end))
            position = end
        placed[at] = tuple(chunks)
    listed = tuple(replace(tensor, chunks=placed[at]) for at, tensor in enumerate(tensors))
    return PartManifest(1, 2, rank, ranks, position, HEADER_BYTES, "0" * 32, listed, {})


def merged_plainly(parts: Sequence[Part]) -> dict[str, LogicalTensor]:
    """What `merge_parts` should give, object by object."""
    chunks: dict[str, list[Chunk]] = {}
    firsts: dict[str, PartTensor] = {}
    for one in parts:
        for tensor in one.tensors:
            firsts.setdefault(tensor.name, tensor)
            chunks.setdefault(tensor.name, []).extend(
                Chunk(chunk.box, data_name(one.rank), chunk.begin, chunk.digest) for chunk in tensor.chunks
            )
    return {
        name: LogicalTensor(name, one.parameter, one.state, one.kind, one.dtype, one.shape, tuple(chunks[name]))
        for name, one in firsts.items()
    }


def merged(parts: Sequence[Part]) -> dict[str, LogicalTensor]:
    return merge_parts("c", (decode_part(encode_part(one), f"{one.rank}") for one in parts))


@settings(deadline=None, max_examples=200)
@given(checkpoints())
def test_a_part_reads_back_as_it_was_written(parts: list[Part]) -> None:
    for one in parts:
        back = decode_part(encode_part(one), "f")
        assert back == one
        assert tuple(back.tensors) == one.tensors and list(reversed(back.tensors)) == list(reversed(one.tensors))
        assert back.tensors[1:] == one.tensors[1:] and encode_part(back) == encode_part(one)
        assert back.tensors.names == [tensor.name for tensor in one.tensors]
        assert hash(back.tensors) == hash(one.tensors)


@settings(deadline=None, max_examples=300)
@given(checkpoints())
def test_merged_parts_hold_the_chunks_that_a_list_would(parts: list[Part]) -> None:
    found, plain = merged(parts), merged_plainly(parts)
    assert list(found.items()) == list(plain.items())
    for name, tensor in found.items():
        expected = plain[name].chunks
        assert isinstance(tensor.chunks, LazyChunks) and len(tensor.chunks) == len(expected)
        assert tuple(tensor.chunks) == expected and tensor.chunks[1:] == expected[1:]
        assert hash(tensor) == hash(plain[name])
        assert [tensor.chunks[at] for at in range(-len(expected), 0)] == list(expected)
        assert tensor.chunks != expected[1:] or not expected
        assert all(type(number) is int for chunk in tensor.chunks for number in (*chunk.box.offsets, chunk.begin))
        with pytest.raises(IndexError):
            tensor.chunks[len(expected)]


@settings(deadline=None, max_examples=300)
@given(checkpoints(), st.data())
def test_coverage_and_copies_are_those_of_the_plain_chunks(parts: list[Part], data: st.DataObject) -> None:
    for tensor in merged(parts).values():
        plain = tuple(tensor.chunks)
        assert flaw_of(tensor.shape, tensor.chunks) == flaw(tensor.shape, (chunk.box for chunk in plain))
        wanted = data.draw(boxes(tensor.shape))
        assert plan_copies(wanted, tensor.chunks) == plan_copies(wanted, plain)
        if wanted.elements:
            assert isinstance(tensor.chunks, LazyChunks)
            touching = [chunk for chunk in plain if intersect(wanted, chunk.box) is not None]
            assert list(tensor.chunks.touching(wanted)) == touching


ROWS: list[tuple[list[tuple[int, int]], str | None]] = [
    ([(0, 6)], None),
    ([(0, 6), (0, 6)], None),
    ([(3, 6), (0, 3)], None),
    ([(0, 1), (1, 5), (5, 6), (1, 5)], None),
    ([(0, 4), (3, 6)], "overlap"),
    ([(0, 6), (0, 3)], "overlap"),
    ([(0, 3), (0, 4), (4, 6)], "overlap"),
    ([(0, 3), (4, 6)], "no chunk holds [3:4, 0:2]"),
    ([(1, 3), (3, 6)], "no chunk holds [0:1, 0:2]"),
    ([(0, 3), (3, 5)], "no chunk holds [5:6, 0:2]"),
    ([(0, 5)], "no chunk holds [5:6, 0:2]"),
    ([], "no chunk holds [0:6, 0:2]"),
]


@pytest.mark.parametrize(("rows", "words"), ROWS)
def test_coverage_of_a_tensor_that_is_divided_along_one_dimension(
    rows: list[tuple[int, int]], words: str | None
) -> None:
    held = tuple(PartChunk(Box((first, 0), (last - first, 2)), 0, 0, "0" * 32) for first, last in rows)
    alike = PartTensor("w", "exp_avg", "state", "BF16", (6, 2), held)
    wider = PartTensor("b", None, "buffer", "F32", (7, 2), held)  # in the same boxes, which are never all of it
    tensors = merged([part(0, 1, [PartTensor("w", None, "parameter", "F32", (6, 2), held), alike, wider])])
    for tensor in tensors.values():
        found = flaw_of(tensor.shape, tensor.chunks)
        assert found == flaw(tensor.shape, (chunk.box for chunk in held))
        assert (found is None) == (words is None and tensor.name != "b")
        assert tensor.name == "b" or words is None or (found is not None and words in found)


def test_only_the_chunks_that_are_read_become_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Box] = []

    def chunk(box: Box, *rest: Any) -> Chunk:
        made.append(box)
        return Chunk(box, *rest)

    monkeypatch.setattr(columns, "Chunk", chunk)
    rows = [Box((2 * rank, 0), (2, 3)) for rank in range(64)]
    parts = [
        part(rank, 64, [PartTensor("w", None, "parameter", "U8", (128, 3), (PartChunk(box, 0, 0, "0" * 32),))])
        for rank, box in enumerate(rows)
    ]
    tensor = merged(parts)["w"]
    assert flaw_of(tensor.shape, tensor.chunks) is None and len(tensor.chunks) == 64 and not made
    plan = plan_copies(Box((63, 1), (3, 2)), tensor.chunks)
    assert [copy.chunk.file for copy in plan.copies] == [data_name(31), data_name(32)]
    assert made == rows[31:33]


def test_a_box_of_another_number_of_dimensions_is_no_question() -> None:
    tensor = PartTensor("w", None, "parameter", "U8", (4, 4), (PartChunk(Box.whole((4, 4)), 0, 0, "0" * 32),))
    chunks = merged([part(0, 1, [tensor])])["w"].chunks
    with pytest.raises(ValueError, match=r"\[0:4\] is no box of a tensor of 2 dimensions"):
        plan_copies(Box.whole((4,)), chunks)


def disagreeing() -> Iterator[tuple[PartTensor, PartTensor, str]]:
    one = PartTensor("a.b", "c", "state", "F32", (2,), ())
    yield one, replace(one, shape=(3,)), r"at tensor a\.b\.c: it is a state of F32 \[3\] but a state of F32 \[2\]"
    yield one, replace(one, dtype="BF16"), r"it is a state of BF16 \[2\] but a state of F32 \[2\] in c/part-00000\.json"
    yield one, replace(one, parameter="a", state="b.c"), r"at tensor a\.b\.c: it is a state of F32 \[2\] but a state"
    value = PartTensor("a.b.c", None, "parameter", "F32", (2,), ())
    yield one, value, r"at tensor a\.b\.c: it is a parameter of F32 \[2\] but a state of F32 \[2\]"
    yield value, replace(value, kind="buffer"), r"it is a buffer of F32 \[2\] but a parameter of F32 \[2\]"


@pytest.mark.parametrize(("first", "second", "words"), [*disagreeing()])
def test_parts_that_disagree_about_a_tensor(first: PartTensor, second: PartTensor, words: str) -> None:
    other = PartTensor("other", None, "parameter", "F32", (2,), ())
    parts = [part(0, 2, [first, other]), part(1, 2, [other, second])]
    with pytest.raises(CorruptCheckpoint, match=rf"checkpoint file c/part-00001\.json is corrupt .*{words}"):
        merged(parts)


def test_no_parts_make_no_tensors() -> None:
    assert merged([]) == {}
