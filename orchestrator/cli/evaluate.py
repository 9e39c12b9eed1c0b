"""`regrow plan --evaluate`: tables of measured runs beside what the models say of them, and what is learnt of them."""

from __future__ import annotations

import json as jsonlib
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.core.errors import InvalidInput

if TYPE_CHECKING:
    from orchestrator.planner.calibration import Calibration
    from orchestrator.planner.evaluate import Prediction
    from orchestrator.planner.rows import Refused


def evaluate(tables: Sequence[Path], learnt: Calibration, calibrate: Path | None, json: bool) -> None:
    """Print the prediction of every row; with `calibrate`, add the measured steps to what that file has learnt.

    `learnt` corrects the predictions. Rows that cannot be estimated are named on standard error; raises `InvalidInput`
    where a table cannot be read at all, or none of its rows can be estimated.
    """
    from orchestrator.planner.calibration import Calibration
    from orchestrator.planner.evaluate import calibrated

    found = [(path, _predicted(path, learnt)) for path in tables]
    if calibrate is not None:
        kept = load(calibrate) if calibrate.exists() else Calibration()
        _write(calibrate, calibrated([one.row for _, rows in found for one in _judged(rows)], kept))
    if json:
        print(jsonlib.dumps({"rows": [_data(one) for _, rows in found for one in rows]}, allow_nan=False))
    else:
        for path, rows in found:
            _show(path, rows)
    sys.stdout.flush()
    for _, rows in found:
        for one in _refused(rows):
            print(f"regrow: {one.reason}", file=sys.stderr)


def load(path: Path) -> Calibration:
    """What `--calibrate` has kept; raises `InvalidInput`."""
    from orchestrator.planner.calibration import Calibration

    try:
        return Calibration.from_data(jsonlib.loads(_text(path)))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is no calibration of regrow (not JSON): give another file or remove it") from error
    except InvalidInput as error:
        raise InvalidInput(f"{path} is {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not text in UTF-8: give a CSV or JSON file") from error
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}") from error


def _write(path: Path, calibration: Calibration) -> None:
    from orchestrator.checkpoint.durable import temporary, write_synced

    written = temporary(path)
    try:
        write_synced(written, (jsonlib.dumps(calibration.to_data(), indent=1) + "\n").encode())
        written.replace(path)
    except OSError as error:
        raise InvalidInput(f"--calibrate {path} cannot be written: {error.strerror or error}") from error


def _predicted(path: Path, learnt: Calibration) -> list[Prediction | Refused]:
    from orchestrator.planner.evaluate import predict
    from orchestrator.planner.rows import Refused, read_rows

    rows = read_rows(_text(path), path.name)
    refused = [one for one in rows if isinstance(one, Refused)]
    if len(refused) == len(rows):
        raise InvalidInput(refused[0].reason)
    return [one if isinstance(one, Refused) else predict(one, learnt) for one in rows]


def _judged(rows: Iterable[Prediction | Refused]) -> list[Prediction]:
    from orchestrator.planner.evaluate import Prediction

    return [one for one in rows if isinstance(one, Prediction)]


def _refused(rows: Iterable[Prediction | Refused]) -> list[Refused]:
    from orchestrator.planner.rows import Refused

    return [one for one in rows if isinstance(one, Refused)]


def _data(one: Prediction | Refused) -> dict[str, Any]:
    from orchestrator.planner.rows import Refused

    if isinstance(one, Refused):
        names = ("measured_step_s", "predicted_step_s", "measured_memory_bytes", "predicted_memory_bytes", "fits")
        return {"row_id": one.row_id, **dict.fromkeys(names)}
    return {
        "row_id": one.row.row_id,
        "measured_step_s": one.row.measured_s,
        "predicted_step_s": one.step_s,
        "measured_memory_bytes": one.row.measured_bytes,
        "predicted_memory_bytes": one.memory_bytes,
        "fits": one.fits,
    }


def _show(path: Path, rows: Sequence[Prediction | Refused]) -> None:
    from rich.console import Console
    from rich.text import Text

    from orchestrator.cli.plan_tables import Grid

    console = Console()
    grid = Grid(["row", "step", "predicted", "off", "GiB", "predicted ", "off ", "fits"])
    predictions = _judged(rows)
    grid.rows.extend(map(_cells, predictions))
    console.print(Text(path.name, style="bold"))
    grid.show(console)
    for what, errors in (
        ("step time", [one.time_error for one in predictions]),
        ("memory", [one.memory_error for one in predictions]),
    ):
        if off := [abs(error) for error in errors if error is not None]:
            sentence = f"{what}: off by {statistics.median(off):.1%} (median), {max(off):.1%} (most) of {len(off)} rows"
            console.print(Text(sentence), soft_wrap=True)
    if crashed := [one for one in predictions if one.row.out_of_memory]:
        console.print(Text(f"out of memory: {sum(not one.fits for one in crashed)} of {len(crashed)} rows foreseen"))
    console.print()


def _cells(one: Prediction) -> list[str]:
    measured, held = one.row.measured_s, one.row.measured_bytes
    return [
        one.row.row_id,
        f"{measured:.4g} s" if measured else "-",
        f"{one.step_s:.4g} s",
        _off(one.time_error),
        f"{held / 2**30:.1f}" if held else "OOM" if one.row.out_of_memory else "-",
        f"{one.memory_bytes / 2**30:.1f}",
        _off(one.memory_error),
        "yes" if one.fits else "no",
    ]


def _off(error: float | None) -> str:
    return "-" if error is None else f"{error:+.0%}"
