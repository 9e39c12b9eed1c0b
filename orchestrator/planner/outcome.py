"""What the planner answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.core.types import Assignment, Plan


@dataclass(frozen=True, slots=True)
class Candidate:
    """A legal plan with its estimate; step time, memory and the reason in words stand in the plan."""

    plan: Plan
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of a step by what they are spent on; their sum is `plan.step_s`. Empty when the model is not described."""
    memory: Mapping[str, float] = field(default_factory=dict)
    """Bytes on the fullest device by what they hold; empty when the model is not described."""
    tokens_per_s: float = 0.0
    """Of all devices together; 0 when the model is not described."""
    mfu: float = 0.0
    """Model FLOPs utilisation: the model's own operations, recomputation apart, against the devices' peak."""
    lost: str = ""
    """Why it is not the plan, in a few words."""

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
    weighed: int = 0
    """Complete plans whose time was estimated; those known to be slower or too large were left out."""


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No legal plan exists. `reason` is one sentence that ends with the smallest change that would make one exist."""

    reason: str
    rejected: tuple[Rejection, ...]
    needs: str
    """That change by itself, for example `1 more node`."""
