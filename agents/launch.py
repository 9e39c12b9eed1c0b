"""The record of one launch on this node: what its processes said, made into a `LaunchReport`. No I/O but error files.

Times are seconds of a monotonic clock that the caller passes in, except where `time_s` says Unix time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agents.processes import signal_name
from agents.reconcile import CurrentLaunch
from orchestrator import wire
from orchestrator.core.errors import InvalidInput
from orchestrator.core.types import (
    ENDED,
    AssignedNode,
    LaunchOrder,
    LaunchReport,
    LaunchState,
    SaveReport,
    WorkerError,
    WorkerReport,
    WorkerState,
)

LOG_TAIL_BYTES = 4096
"""How much of a worker's log stands in for the traceback that it could not write."""


@dataclass(slots=True)
class Worker:
    """One worker process."""

    rank: int
    pid: int
    progressed_s: float
    heard_s: float
    state: WorkerState = WorkerState.STARTING
    exit_code: int | None = None
    step: int = 0
    loss: float | None = None
    held: bool = False
    """Stopped by a signal or in uninterruptible sleep."""

    def report(self, now_s: float) -> WorkerReport:
        """What the controller is told."""
        state = WorkerState.STOPPED if self.held and self.exit_code is None else self.state
        return WorkerReport(
            rank=self.rank,
            pid=self.pid,
            state=state,
            exit_code=self.exit_code,
            step=self.step,
            idle_s=max(0.0, now_s - self.progressed_s),
            ping_age_s=max(0.0, now_s - self.heard_s),
            loss=self.loss,
        )


@dataclass(slots=True)
class Launch:
    """One generation on this node, from the order to its end."""

    order: LaunchOrder
    part: AssignedNode
    directory: Path
    group: int | None = None
    """Process group: the pid of its elastic process; None until it was forked."""
    state: LaunchState = LaunchState.STARTING
    stop_ordered: bool = False
    store: str | None = None
    endpoint_told: bool = False
    result: str | None = None
    """`succeeded` or `failed`, as the elastic process concluded."""
    workers: dict[int, Worker] = field(default_factory=dict)
    saves: list[SaveReport] = field(default_factory=list)
    errors: list[WorkerError] = field(default_factory=list)
    paused_step: int | None = None
    ordered_save: int = 0
    request: int = 0
    """Number of the last request passed to the worker of rank 0."""
    pausing: bool = False

    @property
    def generation(self) -> int:
        """Number of the generation."""
        return self.order.generation.number

    @property
    def ended(self) -> bool:
        """True when no process of it is alive."""
        return self.state in ENDED

    @property
    def hosts_store(self) -> bool:
        """True on the node of rank 0."""
        return self.part.first_rank == 0

    @property
    def training(self) -> bool:
        """True while a save makes sense: rank 0 trains here and was not asked to pause."""
        first = self.workers.get(0)
        return first is not None and first.state is WorkerState.RUNNING and not self.pausing

    def current(self) -> CurrentLaunch:
        """The view that `reconcile` decides on."""
        told = self.hosts_store or self.endpoint_told
        return CurrentLaunch(self.generation, self.ended, told, self.ordered_save, self.pausing)

    def report(self, now_s: float) -> LaunchReport:
        """What the controller is told."""
        return LaunchReport(
            generation=self.generation,
            state=self.state,
            store=self.store,
            workers=tuple(self.workers[rank].report(now_s) for rank in sorted(self.workers)),
            saves=tuple(self.saves),
            errors=tuple(self.errors),
            paused_step=self.paused_step,
        )

    def forget_saves(self, committed_step: int | None) -> bool:
        """Drop parts that are known to be committed; True when there were any."""
        kept = [save for save in self.saves if committed_step is None or save.step > committed_step]
        dropped = len(kept) < len(self.saves)
        self.saves = kept
        return dropped

    # ------------------------------------------------------------ what the elastic process says

    def from_elastic(self, message: dict[str, Any], now_s: float) -> None:
        """Take in one message of the elastic process; KeyError or TypeError when it makes no sense."""
        kind = message["type"]
        if kind == "workers":
            for rank, pid in message["pids"].items():
                self.workers[int(rank)] = Worker(int(rank), int(pid), progressed_s=now_s, heard_s=now_s)
        elif kind == "store":
            self.store = str(message["endpoint"])
        elif kind == "running" and self.state is LaunchState.STARTING:
            self.state = LaunchState.RUNNING
        elif kind == "exit":
            self._exited(int(message["rank"]), int(message["code"]), float(message["time_s"]), message["ended_here"])
        elif kind == "result":
            self.result = str(message["state"])
            if "exception" in message:
                self._elastic_failed(message)

    def _exited(self, rank: int, code: int, time_s: float, ended_here: bool) -> None:
        worker = self.workers[rank]
        worker.state, worker.exit_code = WorkerState.EXITED, code
        if code != 0:
            self._add_error(worker, time_s, ended_here)

    def _add_error(self, worker: Worker, time_s: float, ended_here: bool) -> None:
        """The worker's own account, else its exit code, unless it was this node that ended it."""
        assert worker.exit_code is not None
        error = self._error_file(worker.rank)
        if error is not None:
            self.errors.append(replace(error, step=worker.step))
        elif not ended_here and not self.stop_ordered:
            cause = signal_name(worker.exit_code)
            message = f"the worker of rank {worker.rank} (pid {worker.pid}) ended with {cause}"
            tail = self.log_tail(worker.rank)
            self.errors.append(WorkerError(worker.rank, cause, message, tail, worker.step, time_s))

    def _error_file(self, rank: int) -> WorkerError | None:
        try:
            error: WorkerError = wire.loads((self.directory / f"error-{rank}.json").read_bytes(), WorkerError)
        except (OSError, InvalidInput):
            return None  # killed before it could write one, or a full disk: the exit code has to do
        return error

    def log_tail(self, rank: int) -> str:
        """The end of the worker's log; empty when there is none."""
        try:
            with (self.directory / f"worker-{rank}.log").open("rb") as log:
                log.seek(0, 2)
                log.seek(max(0, log.tell() - LOG_TAIL_BYTES))
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def _elastic_failed(self, message: dict[str, Any]) -> None:
        self.errors.append(
            WorkerError(
                rank=self.part.first_rank,
                exception=str(message["exception"]),
                message=f"the workers of this node could not be started: {message['message']}",
                traceback=str(message["traceback"]),
                step=0,
                time_s=float(message["time_s"]),
                collective=bool(message["collective"]),
            )
        )

    # ------------------------------------------------------------ what a worker says

    def from_worker(self, rank: int, message: dict[str, Any], now_s: float) -> bool:
        """Take in one message of a worker; True when the controller should hear of it at once."""
        worker = self.workers[rank]
        worker.heard_s = now_s
        kind = message["type"]
        if kind == "hello" and worker.state is WorkerState.STARTING:
            worker.state = WorkerState.RESTORING
        elif kind == "ready":
            worker.state, worker.step, worker.progressed_s = WorkerState.READY, int(message["step"]), now_s
        elif kind == "progress":
            return self._progressed(worker, message, now_s)
        elif kind == "save":
            self._saved(wire.from_data(message["report"], SaveReport))
        elif kind == "paused":
            self.paused_step = int(message["step"])
        return kind in {"hello", "ready", "save", "paused"}

    def _saved(self, report: SaveReport) -> None:
        """A worker whose connection broke says the same again."""
        if report not in self.saves:
            self.saves.append(report)

    def _progressed(self, worker: Worker, message: dict[str, Any], now_s: float) -> bool:
        first = worker.state is not WorkerState.RUNNING
        if worker.exit_code is None:
            worker.state = WorkerState.RUNNING
        worker.step, worker.progressed_s = int(message["step"]), now_s
        if message.get("loss") is not None:
            worker.loss = float(message["loss"])
        return first

    # ------------------------------------------------------------ the end

    def end(self, exit_code: int, reaped: dict[int, int], time_s: float) -> None:
        """Nothing of the launch is alive any more; `exit_code` is that of its elastic process."""
        if self.result is None and not self.stop_ordered:
            self._lost_elastic(f"the elastic process of generation {self.generation}", exit_code, time_s)
        for worker in self.workers.values():
            if worker.exit_code is None:
                worker.state, worker.exit_code = WorkerState.EXITED, reaped.get(worker.pid, -9)
        self.state = self._final_state()

    def lost(self, what: str, exit_code: int, time_s: float) -> None:
        """Like `end`, when `what` died underneath."""
        if not self.stop_ordered:
            self.result = "failed"
            self._lost_elastic(what, exit_code, time_s)
        self.end(exit_code, {}, time_s)

    def stillborn(self, reason: str, time_s: float) -> None:
        """No process could even be started, because of `reason`."""
        self.errors.append(WorkerError(self.part.first_rank, "OSError", reason, "", 0, time_s))
        self.state = LaunchState.FAILED

    def _lost_elastic(self, what: str, exit_code: int, time_s: float) -> None:
        cause = signal_name(exit_code)
        steps = [worker.step for worker in self.workers.values()]
        message = f"{what} ended with {cause}, and its workers with it"
        self.errors.append(WorkerError(self.part.first_rank, cause, message, "", max(steps, default=0), time_s))

    def _final_state(self) -> LaunchState:
        if self.result == "succeeded":
            return LaunchState.SUCCEEDED if self.paused_step is None else LaunchState.PAUSED
        if self.result == "failed" or not self.stop_ordered:
            return LaunchState.FAILED
        return LaunchState.STOPPED
