"""Intersections, copies and coverage by example; `tests/properties/test_reshard.py` has the general law."""

import pytest

from orchestrator.checkpoint.layout import Box, Chunk
from orchestrator.checkpoint.reshard import flaw, intersect, overlap, plan_copies, subtract


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...], file: str = "f") -> Chunk:
    return Chunk(Box(offsets, sizes), file, 0)


def test_intersection() -> None:
    assert intersect(Box((0, 0), (4, 4)), Box((2, 3), (4, 4))) == Box((2, 3), (2, 1))
    assert intersect(Box((0,), (4,)), Box((4,), (4,))) is None
    assert intersect(Box((), ()), Box((), ())) == Box((), ())
    assert intersect(Box((0,), (0,)), Box((0,), (4,))) is None


def test_subtraction_leaves_the_frame() -> None:
    rest = list(subtract(Box((0, 0), (4, 4)), Box((1, 1), (2, 2))))
    assert rest == [Box((0, 0), (1, 4)), Box((3, 0), (1, 4)), Box((1, 0), (2, 1)), Box((1, 3), (2, 1))]
    assert list(subtract(Box((), ()), Box((), ()))) == []


def test_copies_are_relative_to_chunk_and_destination() -> None:
    plan = plan_copies(Box((3, 0), (3, 6)), [chunk((0, 0), (4, 6)), chunk((4, 0), (4, 6))])
    assert [(copy.source, copy.destination) for copy in plan.copies] == [
        (Box((3, 0), (1, 6)), Box((0, 0), (1, 6))),
        (Box((0, 0), (2, 6)), Box((1, 0), (2, 6))),
    ]
    assert plan.missing == ()


def test_a_replica_is_not_read_twice() -> None:
    plan = plan_copies(Box((0,), (4,)), [chunk((0,), (4,), "a"), chunk((0,), (4,), "b")])
    assert [copy.chunk.file for copy in plan.copies] == ["a"]


def test_missing_elements_are_reported_as_boxes() -> None:
    assert plan_copies(Box((0,), (10,)), [chunk((2,), (3,))]).missing == (Box((0,), (2,)), Box((5,), (5,)))
    assert plan_copies(Box((), ()), []).missing == (Box((), ()),)
    assert plan_copies(Box((0,), (0,)), []).missing == ()


@pytest.mark.parametrize(
    ("shape", "boxes", "words"),
    [
        ((4, 4), [((0, 0), (4, 2)), ((0, 2), (4, 2))], None),
        ((4, 4), [((0, 0), (4, 2)), ((0, 2), (4, 2)), ((0, 2), (4, 2))], None),  # a replica
        ((4, 4), [((0, 0), (4, 2))], "no chunk holds [0:4, 2:4]"),
        ((4, 4), [((0, 0), (4, 3)), ((0, 2), (4, 2))], "overlap"),
        ((4, 4), [((0, 0), (4, 4)), ((1, 1), (1, 1))], "overlap"),
        # as many elements as the tensor has, one of them twice and one not at all
        ((4,), [((0,), (2,)), ((1,), (2,))], "overlap"),
        ((), [((), ())], None),
        ((), [], "no chunk holds []"),
        ((0, 7), [], None),
        ((2, 2), [((0, 0), (1, 1)), ((0, 1), (2, 1))], "no chunk holds [1:2, 0:1]"),
    ],
)
def test_flaw(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], words: str | None) -> None:
    found = flaw(shape, [Box(*box) for box in boxes])
    assert found is None if words is None else found is not None and words in found


def test_overlap_of_scalars() -> None:
    assert overlap([Box((), ()), Box((), ())]) is not None


def test_coverage_of_a_large_grid_is_not_quadratic() -> None:
    boxes = [Box((row, column * 8), (1, 8)) for row in range(400) for column in range(16)]
    assert flaw((400, 128), boxes) is None
