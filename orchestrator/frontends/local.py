"""`regrow run`: a whole cluster on this machine, with the faults that were asked for, until the job ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator import jobfile
from orchestrator.core.errors import JobFailed, RegrowError, Unreachable
from orchestrator.core.spec import JobSpec
from orchestrator.core.status import Health, JobStatus, Phase
from orchestrator.frontends.children import adopt_orphans
from orchestrator.frontends.client import Client
from orchestrator.frontends.cluster import Cluster, ledger_of
from orchestrator.frontends.faults import Fault, Kind, Schedule
from orchestrator.frontends.view import View

TICK_S = 0.05
"""How often processes and faults are looked at."""
START_WITHIN_S = 30.0
"""How long the controller may take until it answers."""
STUCK_AFTER_S = 60.0
"""A job that waits for nodes longer than this (beyond its own waiting times) and can get none is given up."""


class Interrupted(RegrowError):
    """A signal ended the run; `exit_code` is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: all processes of the run were ended")
        self.exit_code = 128 + number


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that happened."""

    text: str
    time_s: float
    """Seconds since the start of the run."""
    step: int
    """The job's step then."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended."""

    directory: Path
    status: JobStatus
    started_s: float
    """Unix time."""
    duration_s: float
    injected: tuple[Injected, ...]
    never: tuple[str, ...]
    """Faults whose time never came."""

    @property
    def ledger(self) -> Path:
        """Folder of the samples consumed and the losses."""
        return ledger_of(self.directory)


def new_directory(parent: Path, name: str) -> Path:
    """Create `parent/NAME-N` with the smallest free N."""
    number = 1
    while True:
        directory = parent / f"{name}-{number}"
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            if not directory.exists():
                raise
            number += 1
        else:
            return directory.absolute()


def prepared(spec: JobSpec, directory: Path, *, seed: int | None, keep_checkpoint_uri: bool) -> JobSpec:
    """The job with its checkpoints in the run's directory (unless kept) and the seed asked for."""
    if not keep_checkpoint_uri:
        spec = replace(spec, checkpoint=replace(spec.checkpoint, uri=str(directory / "checkpoints")))
    return spec if seed is None else replace(spec, seed=seed)


def run(spec: JobSpec, nodes: Mapping[str, int], faults: Sequence[Fault], directory: Path, view: View) -> Run:
    """Run `spec` (as from `prepared`) to its end; leaves no process behind, however it ends.

    Raises `Interrupted` on SIGINT and SIGTERM, `JobFailed` when the job can never go on, and whatever the controller
    says against the job. A job that ends as FAILED is a result, not an error.
    """
    adopt_orphans()
    cluster = Cluster(nodes, directory, view.say)
    local = _LocalRun(spec, faults, directory, cluster, view)
    try:
        return asyncio.run(local.run())
    finally:
        with _uninterrupted():
            cluster.stop()


class _LocalRun:
    def __init__(self, spec: JobSpec, faults: Sequence[Fault], directory: Path, cluster: Cluster, view: View) -> None:
        self._spec = spec
        self._schedule = Schedule(list(faults))
        self._directory = directory
        self._cluster = cluster
        self._view = view
        self._status: JobStatus | None = None
        self._injected: list[Injected] = []
        self._started_s = time.monotonic()
        self._waiting_since_s: float | None = None

    async def run(self) -> Run:
        """Start, watch, break and mend until the job has ended."""
        started_s = time.time()
        main = asyncio.current_task()
        assert main is not None
        with _cancelling(main):
            self._cluster.start()
            async with Client(self._cluster.url, self._cluster.token) as client:
                await self._submit(client)
                following = asyncio.create_task(self._follow(client))
                try:
                    status = await self._watch(following)
                finally:
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
        duration_s = time.monotonic() - self._started_s
        never = tuple(fault.text for fault in self._schedule.pending)
        return Run(self._directory, status, started_s, duration_s, tuple(self._injected), never)

    async def _submit(self, client: Client) -> None:
        end_s = time.monotonic() + START_WITHIN_S
        while not await client.healthy():
            self._cluster.poll()
            if time.monotonic() > end_s:
                log = self._cluster.controller.log
                raise Unreachable(f"the controller did not answer within {START_WITHIN_S:.0f} s: see {log}")
            await asyncio.sleep(TICK_S)
        await client.submit(jobfile.dump(self._spec))

    async def _follow(self, client: Client) -> None:
        async for status in client.follow(self._spec.name, TICK_S):
            self._status = status
            self._schedule.observe(status)
            self._inject()
            self._view.show(status)

    async def _watch(self, following: asyncio.Task[None]) -> JobStatus:
        while not following.done():
            self._cluster.poll()
            self._inject()
            self._give_up_when_stuck()
            await asyncio.wait([following], timeout=TICK_S)
        following.result()
        assert self._status is not None
        return self._status

    def _inject(self) -> None:
        time_s = time.monotonic() - self._started_s
        for fault in self._schedule.due(self._status, time_s):
            if self._do(fault):
                self._schedule.done(fault)
                step = self._status.step if self._status else 0
                self._injected.append(Injected(fault.text, time_s, step))
                self._view.say(f"{'return' if fault.kind is Kind.RETURN else 'fault'} {fault.text!r} at step {step}")

    def _do(self, fault: Fault) -> bool:
        """Whether it could be done now; otherwise it stays due."""
        cluster = self._cluster
        match fault.kind:
            case Kind.CONTROLLER:
                return self._crash(None)
            case Kind.AGENT:
                return all(cluster.agents[node].alive for node in fault.nodes) and all(map(self._crash, fault.nodes))
            case Kind.NODE:
                if not cluster.away.isdisjoint(fault.nodes):
                    return False
                for node in fault.nodes:
                    cluster.lose(node)
                return True
            case Kind.RETURN:
                if not cluster.away.issuperset(fault.nodes):
                    return False
                for node in fault.nodes:
                    cluster.bring_back(node)
                return True
            case Kind.WORKER | Kind.HANG:
                number = signal.SIGKILL if fault.kind is Kind.WORKER else signal.SIGSTOP
                return self._signal_workers(fault.nodes, number)

    def _crash(self, node: str | None) -> bool:
        child = self._cluster.controller if node is None else self._cluster.agents[node]
        if not child.alive:
            return False
        self._cluster.crash(node)
        return True

    def _signal_workers(self, nodes: tuple[str, ...], number: signal.Signals) -> bool:
        pids = {node.node: node.pids for node in self._status.nodes} if self._status else {}
        if not all(pids.get(node) for node in nodes):
            return False
        return all(self._cluster.signal_worker(node, pids[node], number) is not None for node in nodes)

    def _give_up_when_stuck(self) -> None:
        """A job that waits for nodes while none can come any more would wait for ever."""
        status = self._status
        can_change = any(fault.trigger.time_s is not None for fault in self._schedule.pending)
        if status is None or status.phase is not Phase.WAITING or can_change or self._coming(status):
            self._waiting_since_s = None
            return
        now_s = time.monotonic()
        self._waiting_since_s = self._waiting_since_s or now_s
        recovery = self._spec.recovery
        limit_s = STUCK_AFTER_S + (recovery.wait_for_replacement_s or 0.0) + recovery.settle_s + recovery.lost_after_s
        if now_s - self._waiting_since_s > limit_s:
            raise JobFailed(
                f"job {status.name} has waited {limit_s:.0f} s at step {status.step} and no node can join any more "
                f"({status.reason}): give more --nodes, or a --return with a WHEN that comes, such as t=60"
            )

    def _coming(self, status: JobStatus) -> bool:
        """Whether some node that is not lost has yet to register."""
        here = {node.node for node in status.nodes if node.verdict.health is not Health.LOST}
        return not here.issuperset(self._cluster.agents.keys() - self._cluster.away)


@contextlib.contextmanager
def _cancelling(task: asyncio.Task[Run]) -> Iterator[None]:
    """SIGINT and SIGTERM cancel `task`, which then ends with `Interrupted`."""
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        task.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    except asyncio.CancelledError:
        if not received:
            raise
        raise Interrupted(received[0]) from None
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not cut the clean-up short: that takes seconds at most."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
