"""One plan out of many with everything that is estimated of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import BatchSplit, Mesh, Plan, Recomputation
from orchestrator.planner import shares
from orchestrator.planner.batch import split
from orchestrator.planner.candidates import RECOMPUTATIONS, Candidates
from orchestrator.planner.judge import SHARES, Judge
from orchestrator.planner.outcome import Candidate
from orchestrator.planner.pool import Pool
from orchestrator.planner.space import Rows, candidates, length, stage_layers, take


@dataclass(frozen=True, slots=True)
class Estimate:
    """One plan on one pool."""

    pool: Pool
    mesh: Mesh
    batch: BatchSplit
    recomputation: Recomputation
    interleave: int
    zero: int
    stage_layers: tuple[int, ...]
    step: float
    """Seconds, or relative units without a model."""
    seconds: Mapping[str, float]
    memory: Mapping[str, float]
    """Bytes on the fullest device; empty when the model is not described, as `seconds` is."""
    tokens_per_s: float = 0.0
    mfu: float = 0.0
    way: int = SHARES
    """What devices of several speeds get: see `judge.SHARES`."""

    @property
    def memory_bytes(self) -> int:
        """Of the fullest device; 0 when the model is not described."""
        return int(sum(self.memory.values()))

    def candidate(self, reason: str, lost: str = "") -> Candidate:
        """As the planner answers it."""
        plan = Plan(
            mesh=self.mesh,
            batch=self.batch,
            recomputation=self.recomputation,
            stage_layers=self.stage_layers,
            reason=reason,
            memory_bytes=self.memory_bytes,
            step_s=self.step if self.seconds else 0.0,
            interleave=self.interleave,
            zero=self.zero,
        )
        return Candidate(plan, self.seconds, self.memory, self.tokens_per_s, self.mfu, lost)


def estimates(spec: JobSpec, pools: Sequence[Pool], judges: Sequence[Judge], rows: Rows) -> list[Estimate]:
    """Each of the complete `rows`; their `pool` says on which of `pools`."""
    found: list[Estimate | None] = [None] * length(rows)
    for number in np.unique(rows["pool"]):
        mine = np.flatnonzero(rows["pool"] == number)
        terms = _Terms(spec, pools[number], judges[number], candidates(take(rows, mine)))
        for at, position in enumerate(mine):
            found[position] = terms.estimate(at)
    return [one for one in found if one is not None]


class _Terms:
    """What is estimated of several plans at once."""

    def __init__(self, spec: JobSpec, pool: Pool, judge: Judge, plans: Candidates) -> None:
        self._spec, self._pool, self._judge, self._plans = spec, pool, judge, plans
        self._seconds, self._memory = judge.where_seconds(plans), judge.where_memory(plans)
        self._way = judge.way(plans)
        self._steps = np.asarray(sum(self._seconds.values())) if self._seconds else judge.seconds(plans)

    def estimate(self, at: int) -> Estimate:
        """The plan at this position."""
        spec, plans = self._spec, self._plans
        mesh, step = plans.mesh(at), float(self._steps[at])
        layers: tuple[int, ...] = ()
        tokens_per_s = 0.0
        if spec.model is not None:
            ends = int(plans.layers_first[at]), int(plans.layers_last[at])
            layers = stage_layers(spec.model.layers, mesh.pp, *ends)
            tokens_per_s = spec.global_batch * spec.model.seq_length / step
        return Estimate(
            pool=self._pool,
            mesh=mesh,
            batch=self._batch(mesh, at),
            recomputation=RECOMPUTATIONS[int(plans.recomputation[at])],
            interleave=int(plans.interleave[at]),
            zero=int(plans.zero[at]),
            stage_layers=layers,
            step=step,
            seconds={name: float(term[at]) for name, term in self._seconds.items() if term[at]},
            memory={name: float(term[at]) for name, term in self._memory.items() if term[at]},
            tokens_per_s=tokens_per_s,
            mfu=self._judge.utilisation(tokens_per_s, mesh.world_size),
            way=int(self._way[at]),
        )

    def _batch(self, mesh: Mesh, at: int) -> BatchSplit:
        batch, micro_batch = self._spec.global_batch, int(self._plans.micro_batch[at])
        if not self._pool.mixed or self._way[at] != SHARES:
            return split(batch, mesh.dp_degree, micro_batch)
        counts = shares.replicas_of(self._pool, self._plans.take(slice(at, at + 1)))[:, 0]
        speeds = [speed for speed, count in zip(self._pool.speeds, counts, strict=True) for _ in range(count)]
        return shares.split(batch, speeds[::-1], micro_batch, mesh.pp if self._plans.interleave[at] > 1 else 1)
