"""Made-up statuses for tests of what is shown and when faults are due."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.core.status import Health, IncidentStatus, JobStatus, NodeStatus, Phase, Verdict
from orchestrator.core.types import AssignedNode, Assignment, BatchSplit, Mesh, Plan, Probes


def plan(**sizes: int) -> Plan:
    mesh = Mesh(**sizes)
    return Plan(mesh, BatchSplit(8, 2, 2, (8 // mesh.dp_degree,) * mesh.dp_degree), reason="it fits")


def node(name: str, rank: int | None, step: int = 0, **changes: Any) -> NodeStatus:
    ranks = () if rank is None else (rank,)
    pids = () if rank is None else (1000 + rank,)
    made = NodeStatus(name, Verdict(Health.HEALTHY, "reports"), 1, len(ranks), ranks, pids, step, False, Probes())
    return replace(made, **changes)


def incident(number: int, *, over: bool, cause: str = "node-2 lost", **changes: Any) -> IncidentStatus:
    made = IncidentStatus(
        number=number,
        cause=cause,
        from_plan=plan(dp_shard=2, tp=2),
        to_plan=plan(dp_shard=2) if over else None,
        from_nodes=4,
        to_nodes=2 if over else 0,
        reason="2 devices are left",
        opened_s=100.0,
        closed_s=103.0 if over else None,
        stages_s={"detect": 0.5, "stop": 0.25, "launch": 2.25} if over else {"detect": 0.5},
        failed_step=42,
        resumed_step=40 if over else None,
    )
    return replace(made, **changes)


def status(phase: Phase = Phase.RUNNING, step: int = 0, generation: int = 1, **changes: Any) -> JobStatus:
    made = JobStatus(
        name="gpt",
        phase=phase,
        reason="because",
        generation=generation,
        plan=plan(dp_shard=2),
        assignment=Assignment((AssignedNode("node-1", 0, 1), AssignedNode("node-2", 1, 1))),
        nodes=(node("node-1", 0, step), node("node-2", 1, step)),
        step=step,
        loss=None if step == 0 else 2.5,
        committed_step=None,
        incidents=(),
        failure=None,
        time_s=100.0,
    )
    return replace(made, **changes)
