"""One plan out of many with everything that is estimated of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import BatchSplit, Mesh, Plan, Recomputation
from orchestrator.planner.batch import split
from orchestrator.planner.candidates import RECOMPUTATIONS
from orchestrator.planner.judge import Judge
from orchestrator.planner.outcome import Candidate
from orchestrator.planner.pool import Pool
from orchestrator.planner.space import Rows, candidates, stage_layers, take


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
    return [_estimate(spec, pools, judges, take(rows, slice(at, at + 1))) for at in range(len(rows["pp"]))]


def _estimate(spec: JobSpec, pools: Sequence[Pool], judges: Sequence[Judge], row: Rows) -> Estimate:
    at = int(row["pool"][0])
    plans, judge = candidates(row), judges[at]
    mesh = plans.mesh(0)
    batch = split(spec.global_batch, mesh.dp_degree, int(plans.micro_batch[0]))
    layers: tuple[int, ...] = ()
    tokens_per_s = 0.0
    step = float(judge.seconds(plans)[0])
    if spec.model is not None:
        ends = int(plans.layers_first[0]), int(plans.layers_last[0])
        layers = stage_layers(spec.model.layers, mesh.pp, *ends)
        tokens_per_s = spec.global_batch * spec.model.seq_length / step
    return Estimate(
        pool=pools[at],
        mesh=mesh,
        batch=batch,
        recomputation=RECOMPUTATIONS[int(plans.recomputation[0])],
        interleave=int(plans.interleave[0]),
        zero=int(plans.zero[0]),
        stage_layers=layers,
        step=step,
        seconds=judge.where_seconds(plans),
        memory=judge.where_memory(plans),
        tokens_per_s=tokens_per_s,
        mfu=judge.utilisation(tokens_per_s / mesh.world_size),
    )
