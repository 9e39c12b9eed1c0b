"""The plan ladder of a running job: made ahead of the losses, made anew when what it stands on has changed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from orchestrator.controller.effects import Effects
from orchestrator.core.job import Job
from orchestrator.core.spec import JobSpec
from orchestrator.core.status import Phase, Rung
from orchestrator.core.types import Generation, NodeCapacity
from orchestrator.planner import Infeasible, Planned, ladder

RUNGS = 4
"""Losses that are planned for."""
LOOK_S = 30.0
"""Longest time until a node that came or went beside the job is noticed; each look takes all nodes' verdicts."""


@dataclass(slots=True)
class Ahead:
    """The ladder of one job. Its searches are kept with `effects`, where a plan after a loss finds them."""

    spec: JobSpec
    effects: Effects
    rungs: tuple[Rung, ...] = ()
    _made_for: tuple[int, tuple[NodeCapacity, ...]] = (0, ())
    _looked_s: float = 0.0
    _busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    def due(self, job: Job) -> tuple[Generation, tuple[NodeCapacity, ...]] | None:
        """What to make a ladder for now; None while the last one holds, or nothing runs."""
        generation = job.history.generation
        if job.phase is not Phase.RUNNING or generation is None or self._busy.locked():
            return None
        number = self._made_for[0]
        if generation.number == number and job.now_s - self._looked_s < LOOK_S:
            return None
        self._looked_s = job.now_s
        nodes = job.usable()
        return None if (generation.number, nodes) == self._made_for else (generation, nodes)

    async def make(self, generation: Generation, nodes: tuple[NodeCapacity, ...]) -> None:
        """Make the ladder of a generation on the nodes that could be used."""
        async with self._busy:
            self._made_for, self.rungs = (generation.number, nodes), ()
            known, ready = self.effects.known, self.effects.ready
            found = await asyncio.to_thread(ladder, self.spec, nodes, generation, RUNGS, known, ready)
            self.rungs = tuple(_rung(losses, one) for losses, one in enumerate(found, 1))


def _rung(losses: int, found: Planned | Infeasible) -> Rung:
    if isinstance(found, Infeasible):
        return Rung(losses, None, 0, found.reason)
    return Rung(losses, found.plan, len(found.assignment.nodes), found.plan.reason)
