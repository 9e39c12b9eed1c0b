from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agents.launch import Launch
from orchestrator import wire
from orchestrator.core.errors import InvalidInput
from orchestrator.core.types import LaunchState, WorkerError, WorkerState
from tests.unit.agents.orders import order


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Two workers on node `b`, ranks 2 and 3, pids 102 and 103."""
    wanted = order(7, devices=2)
    part = wanted.generation.assignment.of("b")
    assert part is not None
    record = Launch(wanted, part, tmp_path)
    record.from_elastic({"type": "workers", "pids": {"2": 102, "3": 103}}, 10.0)
    return record


def exited(rank: int, code: int, *, ended_here: bool = False, time_s: float = 1000.0) -> dict[str, Any]:
    return {"type": "exit", "rank": rank, "code": code, "time_s": time_s, "ended_here": ended_here}


def test_worker_goes_through_its_states(launch: Launch) -> None:
    def state() -> WorkerState:
        return launch.report(20.0).workers[0].state

    assert state() is WorkerState.STARTING
    assert launch.from_worker(2, {"type": "hello"}, 11.0)
    assert state() is WorkerState.RESTORING
    assert launch.from_worker(2, {"type": "ready", "step": 40}, 12.0)
    assert state() is WorkerState.READY
    assert launch.from_worker(2, {"type": "progress", "step": 41, "loss": None, "loss_step": None}, 13.0)
    assert state() is WorkerState.RUNNING
    assert not launch.from_worker(2, {"type": "progress", "step": 42, "loss": 0.5, "loss_step": 41}, 14.0)
    assert launch.from_worker(2, {"type": "hello"}, 14.5), "a new connection of the same worker"
    assert not launch.from_worker(2, {"type": "ping"}, 15.0)
    report = launch.report(20.0).workers[0]
    assert (report.state, report.step, report.loss) == (WorkerState.RUNNING, 42, 0.5)
    assert (report.idle_s, report.ping_age_s) == (6.0, 5.0)
    launch.workers[2].held = True
    assert state() is WorkerState.STOPPED
    launch.from_elastic(exited(2, 0), 16.0)
    assert state() is WorkerState.EXITED


def test_launch_runs_once_its_workers_run_the_script(launch: Launch) -> None:
    assert launch.report(0.0).state is LaunchState.STARTING
    launch.from_elastic({"type": "store", "endpoint": "h:1"}, 0.0)
    launch.from_elastic({"type": "running"}, 0.0)
    assert launch.report(0.0).state is LaunchState.RUNNING
    assert launch.report(0.0).store == "h:1"
    launch.state = LaunchState.STOPPING
    launch.from_elastic({"type": "running"}, 0.0)
    assert launch.report(0.0).state is LaunchState.STOPPING


@pytest.mark.parametrize(
    ("result", "stop_ordered", "paused", "state"),
    [
        ("succeeded", False, False, LaunchState.SUCCEEDED),
        ("succeeded", True, False, LaunchState.SUCCEEDED),
        ("succeeded", False, True, LaunchState.PAUSED),
        ("failed", False, False, LaunchState.FAILED),
        ("failed", True, False, LaunchState.FAILED),
        ("failed", False, True, LaunchState.FAILED),
        (None, True, False, LaunchState.STOPPED),
        (None, True, True, LaunchState.STOPPED),
        (None, False, False, LaunchState.FAILED),
    ],
)
def test_final_state(launch: Launch, result: str | None, stop_ordered: bool, paused: bool, state: LaunchState) -> None:
    launch.stop_ordered = stop_ordered
    if paused:
        launch.from_worker(2, {"type": "paused", "step": 9}, 1.0)
    if result is not None:
        launch.from_elastic({"type": "result", "state": result}, 1.0)
    launch.end(0 if result else -9, {103: -11}, 1000.0)
    assert launch.report(0.0).state is state
    assert [w.exit_code for w in launch.report(0.0).workers] == [-9, -11]


def test_error_file_is_read_and_completed_with_the_step(launch: Launch, tmp_path: Path) -> None:
    error = WorkerError(3, "ValueError", "bad", "Traceback", 0, 999.0)
    (tmp_path / "error-3.json").write_text(wire.dumps(error))
    launch.from_worker(3, {"type": "progress", "step": 17}, 1.0)
    launch.from_elastic(exited(3, 1), 2.0)
    launch.from_elastic(exited(2, -9, ended_here=True), 2.0)
    assert launch.report(0.0).errors == (WorkerError(3, "ValueError", "bad", "Traceback", 17, 999.0),)


@pytest.mark.parametrize("content", [None, b"", b'{"rank": 3'])
def test_without_an_error_file_exit_code_and_log_tell(launch: Launch, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "error-3.json").write_bytes(content)
    (tmp_path / "worker-3.log").write_bytes(b"x" * 10_000 + b"the last words \xff")
    launch.from_elastic(exited(3, -11), 2.0)
    (error,) = launch.report(0.0).errors
    assert (error.rank, error.exception, error.time_s) == (3, "signal SIGSEGV", 1000.0)
    assert "pid 103" in error.message
    assert error.traceback.endswith("the last words \ufffd")
    assert len(error.traceback) <= 4096


def test_workers_killed_by_order_are_no_errors(launch: Launch) -> None:
    launch.stop_ordered = True
    launch.from_elastic(exited(3, -9), 2.0)
    launch.end(-9, {}, 1000.0)
    assert launch.report(0.0).errors == ()


def test_lost_warm_process_is_the_error(launch: Launch) -> None:
    launch.lost("the warm process", -9, 1000.0)
    (error,) = launch.report(0.0).errors
    assert launch.report(0.0).state is LaunchState.FAILED
    assert (error.rank, error.exception) == (2, "signal SIGKILL")
    assert error.message.startswith("the warm process")


def test_saves_are_kept_until_committed_and_never_twice(launch: Launch) -> None:
    def save(step: int) -> dict[str, Any]:
        names = ("generation", "step", "rank", "part", "digest", "size_bytes", "stall_s", "write_s")
        return {"type": "save", "report": dict(zip(names, (7, step, 2, "p", "d", 1, 0.1, 0.2), strict=True))}

    for step in (10, 10, 20):
        assert launch.from_worker(2, save(step), 1.0)
    assert [s.step for s in launch.report(0.0).saves] == [10, 20]
    assert not launch.forget_saves(None)
    assert not launch.forget_saves(5)
    assert launch.forget_saves(10)
    assert [s.step for s in launch.report(0.0).saves] == [20]


@pytest.mark.parametrize(
    "message", [{}, {"type": "ready"}, {"type": "progress", "step": "x"}, {"type": "save", "report": 1}]
)
def test_messages_that_make_no_sense_are_refused(launch: Launch, message: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, InvalidInput)):
        launch.from_worker(2, message, 1.0)
    with pytest.raises(KeyError):
        launch.from_worker(99, {"type": "ping"}, 1.0)
