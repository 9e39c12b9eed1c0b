"""Copies that ranks hold of one tensor: equal, or by how much they are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from orchestrator.checkpoint.agreement_of_copies import Disagreement, disagreements
from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.language import Average, Replicated, Rule, Shard, merge
from orchestrator.checkpoint.layout import Box, Chunk
from orchestrator.checkpoint.view import UniversalView


def view_of(folder: Path, average: bool, *copies: list[float]) -> UniversalView:
    shards = []
    for rank, values in enumerate(copies):
        array = np.array(values, np.float32).reshape(2, -1)
        (folder / f"r{rank}").write_bytes(array.tobytes())
        shards.append(Shard(array.shape, (Chunk(Box.whole(array.shape), f"r{rank}", 0),)))
    rule = Rule("w", Average() if average else Replicated())
    tensor = merge("w", "w", None, "parameter", "F32", rule, shards)
    return UniversalView(LocalFiles(folder), step=1, generation=0, state={}, tensors={"w": tensor})


@pytest.mark.parametrize("block_bytes", [1, 8, 1 << 20])
@pytest.mark.parametrize("average", [False, True])
def test_the_largest_difference_is_reported(tmp_path: Path, average: bool, block_bytes: int) -> None:
    view = view_of(tmp_path, average, [1, 2, 3, 4], [1, 2, 3, 4], [1, 2.5, 3, 1])
    assert list(disagreements(view, block_bytes)) == [Disagreement("w", 3, 2, 3.0, average)]


def test_equal_copies_are_silent(tmp_path: Path) -> None:
    assert list(disagreements(view_of(tmp_path, False, [1, np.nan], [1, np.nan]))) == []
    assert list(disagreements(view_of(tmp_path, True, [0.0, 1], [-0.0, 1]))) == []


def test_no_number_on_one_side_is_an_infinite_difference(tmp_path: Path) -> None:
    (found,) = disagreements(view_of(tmp_path, False, [1, np.nan], [1, 2]))
    assert found.largest == float("inf")
    assert str(found) == "the 2 copies of w differ in 1 elements by at most inf: the first is used"
