"""Kinds of value in a job file. Each refuses in the words "must be ..., not ..." that `problems` completes."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from orchestrator.core.spec import AutoInterval

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)\s*(ms|s|m|h|d)")
_STEPS = re.compile(r"(\d{1,12})\s*steps?")
MAX_SIZE = 1_000_000
"""Largest axis, node or layer count: far beyond any machine, near enough to keep arithmetic small."""
LEAST_S, MOST_S = AutoInterval().least_s, AutoInterval().most_s
"""Bounds of an automatic interval between checkpoints where the job file gives none."""


def refuse(expected: str, value: Any) -> PydanticCustomError:
    """The error of a value that should have been something else."""
    return PydanticCustomError(
        "misfit", "must be {expected}, not {found}", {"expected": expected, "found": show(value)}
    )


def show(value: Any) -> str:
    """A value as a person wrote it, shortened."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "empty"
    shown = str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def duration_s(value: Any) -> float:
    """Seconds of a duration such as `500ms`, `10s`, `2m`, `1h`."""
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise refuse("a duration with its unit such as 500ms, 10s, 2m or 1h", value)
    return float(match[1]) * _UNITS_S[match[2]]


def _positive_duration_s(value: Any) -> float:
    seconds = duration_s(value)
    if seconds <= 0:
        raise refuse("a duration above zero", value)
    return seconds


def _auto_duration_s(value: Any) -> Any:
    return None if value == "auto" else duration_s(value)


def _auto_positive_duration_s(value: Any) -> Any:
    return None if value == "auto" else _positive_duration_s(value)


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


def interval(value: Any) -> tuple[float | None, int | None, tuple[float, float] | None]:
    """(seconds, steps, bounds in seconds of an automatic interval) between two checkpoints, exactly one set.

    `auto` and `{min: 10s, max: 1h}` are chosen while the job runs.
    """
    if value == "auto" or isinstance(value, dict):
        return None, None, _auto_interval({} if value == "auto" else value)
    steps = _STEPS.fullmatch(value.strip()) if isinstance(value, str) else None
    if steps and int(steps[1]) > 0:
        return None, int(steps[1]), None
    seconds = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if seconds is None or float(seconds[1]) <= 0:
        raise refuse(_INTERVALS, value)
    return duration_s(value), None, None


_INTERVALS = 'auto, bounds such as {min: 30s, max: 10m}, a number of steps such as "20 steps", or a time such as 30s'


def _auto_interval(given: dict[Any, Any]) -> tuple[float, float]:
    if not given.keys() <= {"min", "max"}:
        raise refuse(_INTERVALS, given)
    least_s = _positive_duration_s(given["min"]) if "min" in given else min(LEAST_S, _most_s(given))
    most_s = _most_s(given) if "max" in given else max(MOST_S, least_s)
    if most_s < least_s:
        raise refuse("bounds with min at most max", given)
    return least_s, most_s


def _most_s(given: dict[Any, Any]) -> float:
    return float(_positive_duration_s(given["max"])) if "max" in given else MOST_S


def bounds(value: Any) -> Any:
    """`2` is short for `{min: 2, max: 2}`."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"min": value, "max": value}
    elif not isinstance(value, dict):
        raise refuse("a size such as 2, or bounds such as {min: 1, max: 4, prefer: 2}", value)
    return value


def argument(value: Any) -> str:
    """An element of an argument list or an environment value: text, or a number written without quotes."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise refuse("text or a number (put quotes around it)", value)
    text = str(value)
    if "\0" in text or not _encodable(text):
        raise refuse("text that a program can be given (no NUL, no lone surrogates)", ascii(text))
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place(value: Any) -> Any:
    """A path or URI: what a message can show in one line and a file system can take."""
    if isinstance(value, str) and not (value.isprintable() and 0 < len(value) <= 4000):
        raise refuse("a path of printable characters", value)
    return value


_TEXT = WithJsonSchema({"type": "string"})
Duration = Annotated[float, BeforeValidator(_positive_duration_s), _TEXT]
"""Seconds above zero."""
Wait = Annotated[float, BeforeValidator(duration_s), _TEXT]
"""Seconds, zero allowed."""
AutoDuration = Annotated[float | None, BeforeValidator(_auto_positive_duration_s), _TEXT]
"""Seconds above zero; None = auto."""
AutoWait = Annotated[float | None, BeforeValidator(_auto_duration_s), _TEXT]
"""Seconds, zero allowed; None = auto."""
Interval = Annotated[tuple[float | None, int | None, tuple[float, float] | None], BeforeValidator(interval), _TEXT]
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
AutoSize = Annotated[Size | None, BeforeValidator(_auto)]
"""A size; None = auto."""
AutoCount = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_auto)]
"""A number of samples; None = auto."""
AutoName = Annotated[Annotated[str, Field(min_length=1)] | None, BeforeValidator(_auto)]
"""A name; None = auto."""
Place = Annotated[str, BeforeValidator(_place)]
"""A path or URI."""
Argument = Annotated[str, BeforeValidator(argument)]
