"""Predictions against published measurements: a selection with its sources, and the whole tables where they are beside
the checkout.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import pytest

from orchestrator.planner.evaluate import Prediction, predict
from orchestrator.planner.rows import parse_rows

SELECTED = Path(__file__).with_name("published.csv")
HELD_OUT = Path(__file__).with_name("held_out.csv")
"""Tables of other software, years and devices, found when the models stood; README.md says what they changed."""
TABLES = Path(__file__).parents[4] / "shared" / "data" / "planner"
SWEEP = "bloom176_prequel"
"""The table to rank plans by."""

CONTRADICTED = {
    "r0142": "the same plan took 2.47 s with the release before",
    "r0143": "the same plan took 2.83 s with the release before",
    "r0167": "1.8 times GB300's with the same release (r0165), whose products are 1.2 times faster",
    "r0315": "twice the time per token of the same model with two samples per micro-batch (r0271)",
    "r0352": "as r0315",
    "r0349": "the same plan took 28.9 s with the next release (r0312)",
    "r0385": "the same plan took 12.5 s in the release before (r0413)",
    "r0378": "1.6 times the time per sample of the same plan with 1280 samples (r0216)",
    "r0384": "its page counts two accumulations, which pp 4 does not give; with pp 1 it would not fit",
    "r0392": "slower than the same plan on the slower B200 (r0402)",
    "r0394": "slower than its own table's other plan by more than its bubble",
    "r0414": "the same plan took 20.8 s with the next release (r0386)",
}
"""Rows whose step is off by more than a quarter, and why."""
NOT_FORESEEN = {"h178": "957 tokens/s per GPU with a release of mid-2025; 3139 with that of r0368"}
"""The same, of the tables found later."""
OUT_OF_MEMORY_ALL_THE_SAME = {"r0587"}
"""Predicted 70 GiB; r0581, a plan within 1 % of its weights and activations, ran with 67."""
NOISY = ("GPT-181B-multilingual", "384", "1568")
"""Its best plan by prediction (r0516) took as long for 1568 samples as for 2048 (r0517)."""


def tables() -> list[Path]:
    if not TABLES.is_dir():
        pytest.skip(f"{TABLES} is not beside this checkout")
    return [path for path in sorted(TABLES.glob("*.csv")) if path.stem != "hardware"]


def predictions(path: Path) -> list[Prediction]:
    return [predict(row) for row in parse_rows(path.read_text(), path.name)]


def errors(found: Iterable[Prediction]) -> dict[str, float]:
    return {one.row.row_id: abs(one.time_error) for one in found if one.time_error is not None}


def memory_errors(found: Iterable[Prediction]) -> list[float]:
    return [abs(one.memory_error) for one in found if one.memory_error is not None]


def regrets(path: Path) -> dict[tuple[str, ...], float]:
    """By how much the plan that the model prefers is slower than the best: same model, devices and batch.

    Rows of the same plan are measurements of one: the best of them counts.
    """
    records = {row["row_id"]: row for row in csv.DictReader(path.read_text().splitlines())}
    groups: dict[tuple[str, ...], dict[tuple[str, ...], list[tuple[float, float]]]] = defaultdict(dict)
    for one in predictions(path):
        row = records[one.row.row_id]
        if row["src"] == SWEEP and one.row.measured_s:
            group = tuple(row[name] for name in ("model", "n_gpus", "gbs", "layers", "hidden", "heads"))
            plan = tuple(row[name] for name in ("tp", "pp", "mbs", "zero_stage"))
            groups[group].setdefault(plan, []).append((one.step_s, one.row.measured_s))
    found = {}
    for group, plans in groups.items():
        measured = {plan: min(seconds for _, seconds in rows) for plan, rows in plans.items()}
        chosen = min(plans, key=lambda plan: plans[plan][0][0])
        found[group] = measured[chosen] / min(measured.values()) - 1
    return found


def test_selected_steps_and_memory_are_predicted() -> None:
    found = predictions(SELECTED)
    off = errors(found)
    assert len(off) > 60
    assert {name: error for name, error in off.items() if error > 0.25} == {}
    assert median(off.values()) < 0.10
    assert median(memory_errors(found)) < 0.10


def test_selected_plans_fit_where_they_ran() -> None:
    for one in predictions(SELECTED):
        assert one.fits is not one.row.out_of_memory, one.row.row_id


def test_the_plan_preferred_in_the_selected_sweep_is_the_best_measured() -> None:
    found = {group[:3]: regret for group, regret in regrets(SELECTED).items()}
    assert found["GPT-181B-multilingual", "384", "2016"] < 0.03


def test_tables_found_later_are_predicted_as_well() -> None:
    by_source: dict[str, list[float]] = defaultdict(list)
    records = {row["row_id"]: row["src"] for row in csv.DictReader(HELD_OUT.read_text().splitlines())}
    found = predictions(HELD_OUT)
    for name, error in errors(found).items():
        by_source[records[name]].append(error)
        assert error < 0.25 or name in NOT_FORESEEN, name
    assert len(records) > 170
    assert {source: median(off) for source, off in by_source.items() if median(off) > 0.16} == {}
    assert all(one.fits for one in found)


def test_every_table_is_read_and_predicted() -> None:
    for path in tables():
        found = predictions(path)
        off = errors(found)
        outside = {name for name, error in off.items() if error > 0.25}
        assert outside <= set(CONTRADICTED), path.name
        assert not off or median(off.values()) < 0.12, path.name
        for one in found:
            if one.row.row_id not in OUT_OF_MEMORY_ALL_THE_SAME:
                assert one.fits is not one.row.out_of_memory, one.row.row_id


def test_half_of_all_published_steps_are_within_an_eighth() -> None:
    every = [error for path in tables() for error in errors(predictions(path)).values()]
    assert len(every) > 450
    assert median(every) < 0.08
    sweep = predictions(TABLES / f"{SWEEP}.csv")
    assert median(memory_errors(sweep)) < 0.05


def test_the_plan_preferred_in_each_group_of_the_sweep_is_within_3_percent_of_the_best() -> None:
    tables()
    found = regrets(TABLES / f"{SWEEP}.csv")
    assert len(found) > 20
    assert {group: regret for group, regret in found.items() if regret > 0.03 and group[:3] != NOISY} == {}
