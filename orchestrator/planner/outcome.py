"""What the planner answers."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.types import Assignment, Plan
from orchestrator.planner.cost import Cost


@dataclass(frozen=True, slots=True)
class Candidate:
    """A legal plan with its estimate; step time, memory and the reason in words stand in the plan."""

    plan: Plan
    cost: Cost

    @property
    def devices(self) -> int:
        """Devices that it uses."""
        return self.plan.mesh.world_size


@dataclass(frozen=True, slots=True)
class Rejection:
    """Something that was not planned, for example `tp 3`, and why."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan, where its ranks go, the other meshes from fast to slow, and what was ruled out."""

    plan: Plan
    assignment: Assignment
    chosen: Candidate
    alternatives: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No legal plan exists. `reason` is one sentence that ends with the smallest change that would make one exist."""

    reason: str
    rejected: tuple[Rejection, ...]
    needs: str
    """That change by itself, for example `1 more node`."""
