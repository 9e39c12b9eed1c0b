"""The asyncio shell around `core.job`: one event at a time is handled, persisted, and only then acted on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from orchestrator.controller.ahead import Ahead
from orchestrator.controller.effects import Effects
from orchestrator.controller.journal import Journal, MemoryJournal, SqliteJournal
from orchestrator.controller.metrics import Metrics
from orchestrator.core.commands import Command, CommitCheckpoint, Push, Record
from orchestrator.core.errors import Conflict, InvalidInput, RegrowError
from orchestrator.core.events import DrainOrdered, Event, NodeDisconnected, NodeReported, SaveOrdered, StopOrdered, Tick
from orchestrator.core.facts import CheckpointRecorded, Fact, JobAccepted
from orchestrator.core.history import replay
from orchestrator.core.job import Job
from orchestrator.core.spec import JobSpec
from orchestrator.core.status import JobStatus, Phase
from orchestrator.core.summary import summarize
from orchestrator.core.types import Directive, Generation, NodeCapacity, NodeReport

log = structlog.get_logger(__name__)

TICK_S = 0.1
"""Longest time between looks at the clock: resolution of every deadline."""


class Controller:
    """Drives one job at a time; a new one may be submitted once the last has ended.

    What agents are told (`directive`) is published only after the facts behind it are durable.
    """

    def __init__(
        self, journal: Journal, clock: Callable[[], float] = time.time, calibration: Path | None = None
    ) -> None:
        self._journal = journal
        self._clock = clock
        self._calibration = calibration
        self._metrics = Metrics()
        self._turn = asyncio.Lock()
        self._job: Job | None = None
        self._effects: Effects | None = None
        self._ahead: Ahead | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._published: dict[str, Directive] = {}
        self._directive_changed: dict[str, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._broken: Exception | None = None
        self._restore(journal.load())

    @classmethod
    def open(cls, journal: Path | None) -> Controller:
        """Controller on the journal file, or in memory; raises `Conflict` when another one holds the file."""
        if journal is None:
            return cls(MemoryJournal())
        return cls(SqliteJournal(journal), calibration=journal.with_name("calibration.json"))

    def close(self) -> None:
        """Release the journal."""
        self._journal.close()

    def _restore(self, facts: list[Fact]) -> None:
        if not facts:
            return
        history = replay(facts)
        self._effects = Effects(history.spec, self._clock, self._calibration)
        self._ahead = Ahead(history.spec, self._effects)
        now_s = self._clock()
        if history.ended is None:
            # A crash between putting a manifest and recording it must not lose the commit.
            known = {one.path for one in history.checkpoints} | set(history.rejected)
            missed = [one for one in self._effects.found(now_s) if one.path not in known]
            news = [one for one in missed if one.step > history.newest_step]
            if news:
                self._journal.append(news)
            for fact in news:
                history.apply(fact)
        self._job = Job(history, now_s)
        log.info("replayed", facts=len(facts), job=history.spec.name, phase=self._job.phase.value)

    # ------------------------------------------------------------------ agents

    async def report(self, report: NodeReport) -> None:
        """Take in one heartbeat; when this returns, `directive(report.node)` is the answer to it."""
        await self._handle(NodeReported(self._clock(), report))
        self._publish((report.node,))

    async def disconnected(self, node: str, instance: str) -> None:
        """The connection of that start of the node's agent is closed."""
        await self._handle(NodeDisconnected(self._clock(), node, instance))

    def directive(self, node: str) -> Directive | None:
        """What the node should be doing; None before its first report."""
        return self._published.get(node)

    async def directives(self, node: str) -> AsyncIterator[Directive]:
        """The node's directive now (once there is one), then every change of it."""
        sent: Directive | None = None
        while True:
            changed = self._directive_changed.setdefault(node, asyncio.Event())
            changed.clear()
            current = self._published.get(node)
            if current is not None and current != sent:
                sent = current
                yield current
            else:
                await changed.wait()

    # ------------------------------------------------------------------ users

    def status(self, name: str) -> JobStatus:
        """The job of that name; raises `InvalidInput` when there is none."""
        if self._job is None or self._job.history.spec.name != name:
            known = f"the job here is {self._job.history.spec.name}" if self._job else "no job has been submitted"
            raise InvalidInput(f"no job is called {name}: {known}")
        return self._seen(self._job)

    def jobs(self) -> list[JobStatus]:
        """All jobs: at most one in this version."""
        return [self._seen(self._job)] if self._job else []

    def _seen(self, job: Job) -> JobStatus:
        rungs = self._ahead.rungs if self._ahead is not None and job.phase is Phase.RUNNING else ()
        return replace(summarize(job), ladder=rungs)

    async def submit(self, spec: JobSpec) -> None:
        """Accept a job; raises `Conflict` while another is active, `CheckpointError` when its store is unusable.

        Checkpoints that the store already holds are taken up: the job goes on from the newest.
        """
        async with self._turn:
            if self._job is not None and self._job.history.ended is None:
                raise Conflict(f"job {self._job.history.spec.name} is active: stop it before submitting {spec.name}")
            now_s = self._clock()
            effects = Effects(spec, self._clock, self._calibration)
            found = await asyncio.to_thread(effects.found, now_s)
            taken = await asyncio.to_thread(effects.newest_generation)
            if self._job is not None:
                taken = max(taken, self._job.history.number)
            facts: list[Fact] = [JobAccepted(now_s, spec, taken), *found]
            await asyncio.to_thread(self._journal.append, facts)
            before = self._job
            self._effects, self._ahead = effects, Ahead(spec, effects)
            self._job = Job(replay(facts), now_s)
        log.info("accepted", job=spec.name, checkpoints=len(found))
        for node in before.fleet.nodes.values() if before else ():
            if node.connected and node.report is not None:
                await self._handle(NodeReported(self._clock(), node.report))
        self._notify()

    async def stop(self, name: str) -> None:
        """Save, then end the job."""
        self.status(name)
        await self._handle(StopOrdered(self._clock()))

    async def save(self, name: str) -> None:
        """Have the workers save at the next step on which they agree."""
        self.status(name)
        await self._handle(SaveOrdered(self._clock()))

    async def drain(self, name: str, node: str, *, drained: bool = True) -> None:
        """Leave the node out (or no longer); raises `InvalidInput` for a node never heard of."""
        known = [one.node for one in self.status(name).nodes]
        if node not in known:
            raise InvalidInput(f"no node is called {node}: known are {', '.join(known) or 'none'}")
        await self._handle(DrainOrdered(self._clock(), node, drained))

    async def undrain(self, name: str, node: str) -> None:
        """Use the node again."""
        await self.drain(name, node, drained=False)

    async def changed(self) -> None:
        """Return after the next change of any status."""
        await self._changed.wait()

    @property
    def metrics_registry(self) -> CollectorRegistry:
        """Prometheus registry of this controller."""
        return self._metrics.registry

    # ------------------------------------------------------------------ the loop

    async def run(self) -> None:
        """Look at the clock until cancelled; everything else is driven by reports."""
        try:
            while self._broken is None:
                await self._handle(Tick(self._clock()))
                await asyncio.sleep(TICK_S)
            raise RegrowError(f"the journal could not be written: {self._broken}")
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _handle(self, event: Event) -> None:
        async with self._turn:
            job = self._job
            if job is None:
                return
            before = (job.phase, job.reason)
            commands = job.handle(event)
            facts = [command.fact for command in commands if isinstance(command, Record)]
            if facts:
                await self._persist(facts)
                self._tell(facts, job)
            if (job.phase, job.reason) != before:
                log.info("phase", phase=job.phase.value, reason=job.reason)
            self._act(commands, job)
            self._look_ahead(job)
            if commands or isinstance(event, Tick):
                self._metrics.show(summarize(job), job.history.max_step)
        if commands or not isinstance(event, Tick):
            self._notify()

    async def _persist(self, facts: list[Fact]) -> None:
        """Make facts durable; when that fails nothing may be done any more: `run` ends, a restart replays."""
        if self._broken is not None:
            raise RegrowError(f"the journal could not be written: {self._broken}")
        try:
            await asyncio.to_thread(self._journal.append, facts)
        except Exception as error:
            self._broken = error
            raise RegrowError(f"the journal could not be written: {error}") from error

    def _tell(self, facts: list[Fact], job: Job) -> None:
        for fact in facts:
            self._metrics.record(fact, job)
            if not isinstance(fact, CheckpointRecorded):
                log.info(type(fact).__name__, **_brief(fact))

    def _act(self, commands: list[Command], job: Job) -> None:
        assert self._effects is not None
        for command in commands:
            match command:
                case Record():
                    pass
                case Push():
                    self._publish(command.nodes)
                case _:
                    if isinstance(command, CommitCheckpoint):
                        self._metrics.committed_parts(job.history.spec.name, command.parts)
                    self._start(self._carry_out(command, self._effects))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _look_ahead(self, job: Job) -> None:
        """While the job runs, have plans for the next losses made."""
        due = self._ahead.due(job) if self._ahead is not None else None
        if due is not None:
            self._start(self._plan_ahead(*due))

    async def _plan_ahead(self, generation: Generation, nodes: tuple[NodeCapacity, ...]) -> None:
        assert self._ahead is not None
        try:
            await self._ahead.make(generation, nodes)
        except Exception:  # what is made ahead is a convenience: training and recovery go on without
            log.exception("plans for the next losses could not be made")
        else:
            self._notify()

    async def _carry_out(self, command: Command, effects: Effects) -> None:
        if isinstance(command, Record | Push):
            return
        try:
            answer = await effects.run(command)
        except Exception:
            log.exception("command failed", command=type(command).__name__)
            return
        if answer is not None:
            await self._handle(answer)

    def _publish(self, nodes: tuple[str, ...]) -> None:
        for node in nodes:
            directive = self._job.directive(node) if self._job else Directive(generation=0)
            if self._published.get(node) != directive:
                self._published[node] = directive
                self._directive_changed.setdefault(node, asyncio.Event()).set()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _brief(fact: Fact) -> dict[str, str]:
    """The fields of a fact that fit on a log line."""
    shown = {name: getattr(fact, name) for name in fact.__slots__ if name not in {"spec", "generation"}}
    with contextlib.suppress(AttributeError):
        shown["generation"] = fact.generation.number  # type: ignore[union-attr]
    return {name: str(value) for name, value in shown.items()}
