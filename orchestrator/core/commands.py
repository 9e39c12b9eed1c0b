"""What the job wants done. The controller makes all `Record`s durable first, then carries out the rest in order.

`MakePlan`, `PrepareCheckpoint` and `CommitCheckpoint` come back as events; the others need no answer, because the next
observation heals whatever was missed.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.facts import Fact
from orchestrator.core.types import Assignment, MeasuredPlan, NodeCapacity, Plan, SaveReport


@dataclass(frozen=True, slots=True)
class Record:
    """Make this fact durable before anything else of the same answer is done."""

    fact: Fact


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Find the best plan for these nodes -> `PlanMade` | `PlanImpossible`."""

    request: int
    nodes: tuple[NodeCapacity, ...]
    previous: Plan | None
    assignment: Assignment | None = None
    """That of `previous`: survivors keep their order."""
    measured: tuple[MeasuredPlan, ...] = ()
    """Steps that the job has reported, oldest first: estimates are corrected by them."""


@dataclass(frozen=True, slots=True)
class PrepareCheckpoint:
    """Check that the checkpoint can be loaded under `plan` -> `CheckpointPrepared` | `CheckpointUnusable`."""

    request: int
    step: int
    path: str
    plan: Plan


@dataclass(frozen=True, slots=True)
class CommitCheckpoint:
    """Put the manifest over these parts, one per rank -> `CheckpointCommitted` | `CommitFailed`."""

    generation: int
    step: int
    world_size: int
    parts: tuple[SaveReport, ...]


@dataclass(frozen=True, slots=True)
class FenceCheckpoints:
    """Refuse every later commit of a generation older than this one; answered only if it is too late (`StoreTaken`)."""

    generation: int


@dataclass(frozen=True, slots=True)
class PruneCheckpoints:
    """Remove what retention no longer needs and what generations older than `live_generation` left uncommitted."""

    keep_last: int
    protect: tuple[str, ...]
    live_generation: int


@dataclass(frozen=True, slots=True)
class Push:
    """The directives of these nodes may have changed: send them now instead of with the next heartbeat's answer."""

    nodes: tuple[str, ...]


Command = Record | MakePlan | PrepareCheckpoint | CommitCheckpoint | FenceCheckpoints | PruneCheckpoints | Push
