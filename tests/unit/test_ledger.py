"""The ledger: what counts of several generations, and how two runs compare."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from orchestrator import ledger
from orchestrator.ledger import Record, Writer, compare, effective


def write(folder: Path, generation: int, rank: int, lines: list[tuple[int, list[int], float | None]]) -> None:
    writer = Writer(folder, generation, rank)
    for line in lines:
        writer.write(*line)
    writer.close()


def test_the_ranks_of_a_step_are_joined_and_their_shares_add_up(tmp_path: Path) -> None:
    write(tmp_path, 1, 10, [(1, [3], 0.25)])
    write(tmp_path, 1, 2, [(1, [1, 2], 0.5)])
    assert effective(tmp_path) == {1: Record((1, 2, 3), 0.75)}


def test_the_highest_generation_counts(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, [(1, [1], 1.0), (2, [2], 2.0), (3, [3], 3.0)])
    write(tmp_path, 2, 0, [(2, [7], 5.0)])
    assert effective(tmp_path) == {1: Record((1,), 1.0), 2: Record((7,), 5.0), 3: Record((3,), 3.0)}


def test_a_line_cut_off_by_a_kill_and_files_of_others_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, [(1, [1], None)])
    with (tmp_path / "gen-0001-rank-00000.jsonl").open("a") as file:
        file.write('{"step": 2, "samp')
    (tmp_path / "gen-x-rank-0.jsonl").write_text("not a ledger\n")
    assert effective(tmp_path) == {1: Record((1,), None)}


def test_a_loss_that_lacks_a_share_is_unknown(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, [(1, [1], 0.5)])
    write(tmp_path, 1, 1, [(1, [2], None)])
    assert effective(tmp_path)[1].loss is None


def test_a_run_resumed_by_the_same_generation_number_appends(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, [(1, [1], 0.5)])
    write(tmp_path, 1, 0, [(2, [2], 0.5)])
    assert list(effective(tmp_path)) == [1, 2]


def test_equal_runs_compare_as_equal() -> None:
    run = {1: Record((1, 2), 1.0), 2: Record((3, 4), None)}
    assert compare(run, run) == (0.0, 0, 0)


@pytest.mark.parametrize(
    ("run", "lost", "repeated"),
    [
        ({1: Record((1, 2, 3), 1.0)}, 0, 0),
        ({1: Record((3, 2, 1), 1.0)}, 0, 0),
        ({1: Record((1, 2), 1.0)}, 1, 0),
        ({1: Record((1, 2, 3, 3), 1.0)}, 0, 1),
        ({1: Record((1, 2, 9), 1.0)}, 1, 1),
        ({}, 3, 0),
        ({1: Record((1, 2, 3), 1.0), 2: Record((4,), 1.0)}, 0, 1),
    ],
)
def test_lost_and_repeated_samples_are_counted_by_step(run: dict[int, Record], lost: int, repeated: int) -> None:
    comparison = compare(run, {1: Record((1, 2, 3), 1.0)})
    assert (comparison.samples_lost, comparison.samples_repeated) == (lost, repeated)


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        (2.0, 2.0, 0.0),
        (2.0, 1.0, 0.5),
        (-1.0, 1.0, 2.0),
        (0.0, 0.0, 0.0),
        (math.nan, math.nan, 0.0),
        (math.nan, 1.0, math.inf),
        (math.inf, 1.0, math.inf),
        (None, 1.0, 0.0),
    ],
)
def test_the_difference_of_losses_is_relative(ours: float | None, theirs: float, difference: float) -> None:
    assert compare({1: Record((), ours)}, {1: Record((), theirs)}).max_loss_difference == difference


def test_a_loss_that_is_not_finite_survives_the_file(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, [(1, [1], math.nan)])
    loss = effective(tmp_path)[1].loss
    assert loss is not None and math.isnan(loss)


def test_reading_needs_the_standard_library_only() -> None:
    source = Path(ledger.__file__).read_text()
    assert "import torch" not in source and "orchestrator" not in source
