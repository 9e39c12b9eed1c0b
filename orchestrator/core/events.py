"""What the job is told. Every event carries the time at which the controller learnt of it (Unix seconds).

Observations (reports, disconnects, ticks) are never stored: after a restart the world is observed anew. Results of
commands name the request they answer, so that an answer nobody waits for any more is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.types import Assignment, NodeReport, Plan


@dataclass(frozen=True, slots=True)
class NodeReported:
    """A heartbeat arrived."""

    time_s: float
    report: NodeReport


@dataclass(frozen=True, slots=True)
class NodesReported:
    """Heartbeats of many nodes that arrived together: what they say is looked at once."""

    time_s: float
    reports: tuple[NodeReport, ...]


@dataclass(frozen=True, slots=True)
class HeartbeatsArrived:
    """Every connected node but the `silent` ones has said again what it said last, just now.

    For a host in virtual time, which passes over hours in which nothing happens.
    """

    time_s: float
    silent: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class NodeDisconnected:
    """The connection of that start of the agent was closed."""

    time_s: float
    node: str
    instance: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing but time has passed."""

    time_s: float


@dataclass(frozen=True, slots=True)
class PlanMade:
    """Answer to `MakePlan`."""

    time_s: float
    request: int
    plan: Plan
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class PlanImpossible:
    """Answer to `MakePlan`: no legal plan; `reason` says the smallest change that would make one."""

    time_s: float
    request: int
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointPrepared:
    """Answer to `PrepareCheckpoint`: every byte the plan needs is there and is what its manifest says."""

    time_s: float
    request: int
    step: int


@dataclass(frozen=True, slots=True)
class CheckpointUnusable:
    """Answer to `PrepareCheckpoint`: corrupt or incomplete."""

    time_s: float
    request: int
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointCommitted:
    """Answer to `CommitCheckpoint`: the manifest is durable."""

    time_s: float
    generation: int
    step: int
    path: str
    size_bytes: int
    cost_s: tuple[float, float] | None = None
    """(Stall, write) seconds, where the host knows them and no parts were reported."""


@dataclass(frozen=True, slots=True)
class CommitFailed:
    """Answer to `CommitCheckpoint`."""

    time_s: float
    generation: int
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class StoreTaken:
    """A generation newer than any of this job's writes to its checkpoints: somebody else runs the job, too."""

    time_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class DrainOrdered:
    """A user wants (or no longer wants) a node to be left out."""

    time_s: float
    node: str
    drained: bool


@dataclass(frozen=True, slots=True)
class StopOrdered:
    """A user ends the job: save, then stop."""

    time_s: float


@dataclass(frozen=True, slots=True)
class SaveOrdered:
    """A user wants a checkpoint now, between the periodic ones."""

    time_s: float


Event = (
    NodeReported
    | NodesReported
    | HeartbeatsArrived
    | NodeDisconnected
    | Tick
    | PlanMade
    | PlanImpossible
    | CheckpointPrepared
    | CheckpointUnusable
    | CheckpointCommitted
    | CommitFailed
    | StoreTaken
    | DrainOrdered
    | SaveOrdered
    | StopOrdered
)
