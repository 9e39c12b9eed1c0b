"""What the steps of a running job teach: each measured plan against its estimate without calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import AssignedNode, MeasuredPlan, NodeCapacity, Plan
from orchestrator.planner.calibration import Calibration
from orchestrator.planner.candidates import RECOMPUTATIONS, Candidates
from orchestrator.planner.judge import judge
from orchestrator.planner.pool import pools
from orchestrator.planner.transformer import split_layers


def learn(
    spec: JobSpec,
    measured: Iterable[MeasuredPlan],
    before: Calibration,
    where: Mapping[str, NodeCapacity] | None = None,
) -> Calibration:
    """`before` with one measurement more for each of `measured`; nothing is learnt where the model is not described.

    `where` says what nodes are, by name, so that a thin network or a throttled node is not taken for slow devices.
    """
    where = where or {}
    if spec.model is None:
        return before
    for one in measured:
        nodes = [_as_measured(part, one.kind, where.get(part.node)) for part in one.assignment]
        pool = pools(spec, nodes)[0]
        predicted_s = float(judge(spec, pool).seconds(_candidates(one.plan, spec.model.layers))[0])
        tp, micro_batch = one.plan.mesh.tp, one.plan.batch.micro_batch
        before = before.observe(pool.device.name, tp, micro_batch, one.step_s, predicted_s)
    return before


def _as_measured(part: AssignedNode, kind: str, now: NodeCapacity | None) -> NodeCapacity:
    """The devices of a node that were used; its speed and place are taken to be those of `now`."""
    node = NodeCapacity(part.node, part.devices, 0, kind)
    return replace(node, rack=now.rack, speed=now.speed) if now else node


def _candidates(plan: Plan, layers: int) -> Candidates:
    mesh, batch = plan.mesh, plan.batch
    split = plan.stage_layers or split_layers(layers, mesh.pp)
    values = (
        *(mesh.pp, plan.interleave, mesh.dp_replicate, mesh.dp_shard, mesh.cp, mesh.tp, mesh.ep, plan.zero),
        *(batch.micro_batch, batch.micro_batches, RECOMPUTATIONS.index(plan.recomputation)),
        *(split[0], max(split[1:-1], default=0), split[-1]),
    )
    return Candidates(*(np.array([value], np.int64) for value in values))
