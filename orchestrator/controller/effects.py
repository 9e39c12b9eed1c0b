"""What commands do to the world: plans are made and checkpoints touched here, in threads, and answered with events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from orchestrator.checkpoint import store
from orchestrator.checkpoint.durable import temporary, write_synced
from orchestrator.checkpoint.verify import verify
from orchestrator.core.commands import CommitCheckpoint, FenceCheckpoints, MakePlan, PrepareCheckpoint, PruneCheckpoints
from orchestrator.core.errors import RegrowError
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointPrepared,
    CheckpointUnusable,
    CommitFailed,
    Event,
    PlanImpossible,
    PlanMade,
    StoreTaken,
)
from orchestrator.core.facts import CheckpointRecorded
from orchestrator.core.spec import JobSpec
from orchestrator.planner import Calibration, Infeasible, Ready, learn, plan

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Effects:
    """Runs the commands of one job. `clock` gives Unix seconds.

    Writers of the store (fence, commit, prune) run one after the other, in the order in which they were ordered.
    """

    spec: JobSpec
    clock: Callable[[], float] = time.time
    kept: Path | None = None
    """File with what the steps of this and earlier jobs have taught; None = nothing is kept between runs."""
    known: Calibration = field(init=False)
    """What it held when this job was taken up. All plans of the job are made with it, so that their estimates can be
    compared with each other; what the job itself measures counts for the next one."""
    ready: Ready = field(default_factory=Ready)
    """What the planner has searched for this job."""
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.known = self._load()

    def _load(self) -> Calibration:
        if self.kept is None or not self.kept.exists():
            return Calibration()
        try:
            return Calibration.from_data(json.loads(self.kept.read_text()))
        except (OSError, ValueError, RegrowError) as error:  # estimates are only less exact without it
            log.warning("what earlier runs have taught cannot be read", file=str(self.kept), error=str(error))
            return Calibration()

    def _keep(self, learnt: Calibration) -> None:
        if self.kept is None or learnt == self.known:
            return
        written = temporary(self.kept)
        try:
            write_synced(written, (json.dumps(learnt.to_data()) + "\n").encode())
            written.replace(self.kept)
        except OSError as error:
            log.warning("what was learnt could not be kept", file=str(self.kept), error=str(error))

    async def run(
        self, command: MakePlan | PrepareCheckpoint | CommitCheckpoint | FenceCheckpoints | PruneCheckpoints
    ) -> Event | None:
        """Carry out one command; the answer is an event, or None where the job expects none.

        Whatever goes wrong becomes the command's negative answer: an effect must never end the controller.
        """
        match command:
            case MakePlan():
                return await asyncio.to_thread(self._plan, command)
            case PrepareCheckpoint():
                return await asyncio.to_thread(self._prepare, command)
            case CommitCheckpoint():
                async with self._writing:
                    return await asyncio.to_thread(self._commit, command)
            case FenceCheckpoints():
                async with self._writing:
                    return await asyncio.to_thread(self._fence, command)
            case PruneCheckpoints():
                async with self._writing:
                    await asyncio.to_thread(self._prune, command)
                return None

    def _plan(self, command: MakePlan) -> Event:
        try:
            where = {node.node: node for node in command.nodes}
            self._keep(learn(self.spec, command.measured, self.known, where))
            planned = plan(self.spec, command.nodes, command.previous, command.assignment, self.known, self.ready)
        except Exception as error:  # a planner bug must leave the job WAITING with a reason, not end the controller
            return PlanImpossible(self.clock(), command.request, f"the planner failed: {error!r}")
        if isinstance(planned, Infeasible):
            return PlanImpossible(self.clock(), command.request, planned.reason)
        return PlanMade(self.clock(), command.request, planned.plan, planned.assignment)

    def _prepare(self, command: PrepareCheckpoint) -> Event:
        try:
            verify(self.spec.checkpoint.uri, command.path)
        except (RegrowError, OSError) as error:
            return CheckpointUnusable(self.clock(), command.request, command.step, str(error))
        return CheckpointPrepared(self.clock(), command.request, command.step)

    def _commit(self, command: CommitCheckpoint) -> Event:
        try:
            done = store.commit(
                self.spec.checkpoint.uri,
                generation=command.generation,
                step=command.step,
                world_size=command.world_size,
                parts=command.parts,
            )
        except (RegrowError, OSError) as error:
            return self._taken(command.generation) or CommitFailed(
                self.clock(), command.generation, command.step, str(error)
            )
        return CheckpointCommitted(self.clock(), command.generation, command.step, done.path, done.size_bytes)

    def _fence(self, command: FenceCheckpoints) -> Event | None:
        try:
            store.fence(self.spec.checkpoint.uri, command.generation)
        except (RegrowError, OSError) as error:
            taken = self._taken(command.generation)
            if taken is None:
                log.warning("checkpoints could not be fenced", error=str(error))
            return taken
        return None

    def _taken(self, generation: int) -> StoreTaken | None:
        """The answer when a generation newer than ours has begun in the store."""
        uri = self.spec.checkpoint.uri
        try:
            newest = store.fenced(uri)
        except (RegrowError, OSError):
            return None
        if newest <= generation:
            return None
        return StoreTaken(
            self.clock(),
            f"generation {newest} of another controller writes to {uri} while this one is at {generation}: "
            "give each run checkpoints of its own, or stop the other",
        )

    def _prune(self, command: PruneCheckpoints) -> None:
        try:
            store.prune(self.spec.checkpoint.uri, command.keep_last, command.protect, command.live_generation)
        except (RegrowError, OSError) as error:
            log.warning("checkpoints could not be pruned", error=str(error))

    def newest_generation(self) -> int:
        """Highest generation that ever wrote to the store or was announced to it; 0 when none."""
        return store.newest_generation(self.spec.checkpoint.uri)

    def found(self, time_s: float) -> list[CheckpointRecorded]:
        """Checkpoints that are committed in the store, oldest first; raises `CheckpointError` when it is unreadable."""
        return [
            CheckpointRecorded(time_s, one.generation, one.step, one.path, one.size_bytes)
            for one in reversed(store.committed(self.spec.checkpoint.uri))
        ]
