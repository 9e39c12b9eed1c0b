"""Root cause: of everything that the workers of a failed generation say, which came first and who is to blame."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.core.spec import FailureClass
from orchestrator.core.types import LaunchReport, WorkerError


@dataclass(frozen=True, slots=True)
class RootCause:
    """Why a generation failed; `signature` is equal for the same error at the same step."""

    kind: FailureClass
    text: str
    signature: str
    node: str | None = None
    error: WorkerError | None = None


def root_cause(launches: Iterable[tuple[str, LaunchReport]], lost: dict[str, str]) -> RootCause:
    """Root cause of a generation from its nodes' last reports and the nodes that were `lost` (name -> reason).

    A lost node explains every failed collective, so it comes first; else the earliest error that is not a mere echo of
    a peer's end; else the earliest echo.
    """
    if lost:
        text = "; ".join(f"{node} lost: {reason}" for node, reason in sorted(lost.items()))
        return RootCause(FailureClass.HARDWARE, text, "")
    errors = [(error, node) for node, launch in launches for error in launch.errors]
    if not errors:
        return RootCause(FailureClass.UNKNOWN, "workers ended without telling why", "")
    error, node = min(errors, key=lambda item: (item[0].collective, _by_signal(item[0]), item[0].time_s, item[0].rank))
    text = f"rank {error.rank} on {node} failed: {error.exception}"
    text += f": {_first_line(error.message)}" if error.message else ""
    return RootCause(_blame(error), text, _signature(error), node, error)


def _by_signal(error: WorkerError) -> bool:
    return error.exception.startswith("signal ")


def _blame(error: WorkerError) -> FailureClass:
    if error.collective:
        return FailureClass.UNKNOWN
    return FailureClass.TRANSIENT if _by_signal(error) else FailureClass.USER


def _signature(error: WorkerError) -> str:
    """Exception type, the line that raised it and the step; not the message, which may hold addresses or times."""
    raised_at = [line.strip() for line in error.traceback.splitlines() if line.strip().startswith("File ")]
    return f"{error.exception}|{raised_at[-1] if raised_at else ''}|{error.step}" if not _by_signal(error) else ""


def _first_line(message: str, limit: int = 200) -> str:
    line = message.strip().splitlines()[0] if message.strip() else ""
    return line if len(line) <= limit else line[: limit - 1] + "…"
