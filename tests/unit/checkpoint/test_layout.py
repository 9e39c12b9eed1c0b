"""Boxes, pieces and logical tensors."""

import numpy as np
import pytest

from orchestrator.checkpoint.layout import Box, LogicalTensor
from tests.unit.checkpoint.saving import piece


def test_a_scalar_has_one_element_and_an_empty_box_none() -> None:
    assert Box((), ()).elements == 1
    assert Box((3, 0), (0, 5)).elements == 0


def test_inside_asks_for_the_right_number_of_dimensions_and_no_overhang() -> None:
    assert Box((2,), (3,)).inside((5,))
    assert Box((), ()).inside(())
    assert Box((5,), (0,)).inside((5,))  # an empty chunk at the end, as uneven sharding leaves it
    assert not Box((3,), (3,)).inside((5,))
    assert not Box((-1,), (3,)).inside((5,))
    assert not Box((1, 1), (1, 1)).inside((5,))
    assert not Box((1,), (1, 1)).inside((5, 5))


def test_boxes_count_from_any_origin() -> None:
    assert Box((4, 6), (2, 2)).relative_to((3, 6)) == Box((1, 0), (2, 2))
    assert str(Box((4, 6), (2, 2))) == "[4:6, 6:8]"


@pytest.mark.parametrize(("state", "name"), [(None, "layers.0.w"), ("exp_avg", "layers.0.w.exp_avg")])
def test_states_are_named_after_their_parameter(state: str | None, name: str) -> None:
    assert piece("layers.0.w", np.zeros(3, np.float32), state=state).name == name


def test_size_of_a_logical_tensor_counts_its_dtype() -> None:
    assert LogicalTensor("w", "w", None, "parameter", "BF16", (3, 4), ()).size_bytes == 24
    assert LogicalTensor("w", "w", None, "parameter", "F64", (), ()).size_bytes == 8
