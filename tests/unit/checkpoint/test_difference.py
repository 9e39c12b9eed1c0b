"""What `diff` says of two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.checkpoint.difference import Difference, compare
from orchestrator.checkpoint.stream import Limits
from tests.unit.checkpoint.samples import ARRAYS, sample

SMALL = Limits(memory_bytes=64 << 10, workers=2)


def difference(tmp_path: Path, a: dict[str, Any], b: dict[str, Any]) -> Difference:
    return compare(sample(tmp_path / "a", a), sample(tmp_path / "b", b, 2), limits=SMALL, progress=lambda count: None)


def test_equal_checkpoints(tmp_path: Path) -> None:
    found = difference(tmp_path, ARRAYS, ARRAYS)
    assert found.same
    assert {one.words for one in found.tensors} == {"equal"}


def test_values(tmp_path: Path) -> None:
    changed = ARRAYS["frozen"].copy()
    changed[3] += 1.5
    changed[6] -= 0.5
    found = difference(tmp_path, ARRAYS, ARRAYS | {"frozen": changed})
    assert not found.same
    (one,) = [one for one in found.tensors if not one.same]
    assert (one.name, one.differing, one.largest_absolute) == ("frozen", 2, 1.5)
    assert one.largest_relative == pytest.approx(1.5 / 4.5)


@pytest.mark.parametrize(
    ("a", "b", "differing", "largest"),
    [
        ([np.nan, 1], [np.nan, 1], 0, 0.0),
        ([np.nan, 1], [2.0, 1], 1, np.inf),
        ([np.inf, 1], [np.inf, 1], 0, 0.0),
        ([0.0, 1], [-0.0, 1], 0, 0.0),
        ([0.0, 1], [1e-30, 1], 1, 1e-30),
    ],
)
def test_values_that_are_no_numbers(tmp_path: Path, a: Any, b: Any, differing: int, largest: float) -> None:
    found = difference(tmp_path, {"frozen": np.array(a, "f4")}, {"frozen": np.array(b, "f4")}).tensors[0]
    assert found.differing == differing
    assert found.largest_absolute == pytest.approx(largest)


def test_dtypes_and_shapes(tmp_path: Path) -> None:
    weight = ARRAYS["layers.0.weight"]
    other = {"layers.0.weight": weight.T.copy(), "frozen": ARRAYS["frozen"].astype("f8")}
    found = difference(tmp_path, {"layers.0.weight": weight, "frozen": ARRAYS["frozen"]}, other)
    assert [one.words for one in found.tensors] == ["shape [37, 11] and [11, 37]", "dtype F32 and F64"]


def test_names_groups_and_step(tmp_path: Path) -> None:
    a, b = sample(tmp_path / "a"), sample(tmp_path / "b", {"frozen": ARRAYS["frozen"]})
    b.step, b.state = 13, {"param_groups": [{"lr": 0.25, "params": []}, {"lr": 0.1, "params": ["embedding"]}]}
    found = compare(a, b, limits=SMALL, progress=lambda count: None)
    assert "embedding" in found.only_a
    assert found.only_b == ()
    assert "step 12 and 13" in found.described
    assert "parameter group 0: lr 0.5 and 0.25" in found.described
