"""What a person or a program sees of a job: the answer of `GET /v1/jobs/NAME`, `regrow status` and the live view.

A view, never read back by the core.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from orchestrator.core.types import Assignment, Plan, Probes


class Phase(enum.StrEnum):
    """Where the job stands; exactly one at a time."""

    WAITING = "WAITING"  # nothing runs: too few nodes, or settling, or planning
    CONVERTING = "CONVERTING"  # the checkpoint is being checked and prepared for the next plan
    STARTING = "STARTING"  # a generation is being launched; no step yet
    RUNNING = "RUNNING"  # training
    STOPPING = "STOPPING"  # the live generation is being ended
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def ended(self) -> bool:
        """True when the job will not run again."""
        return self in {Phase.SUCCEEDED, Phase.FAILED}


class Health(enum.StrEnum):
    """Is this node fit to train?"""

    HEALTHY = "HEALTHY"
    SUSPECT = "SUSPECT"  # a bad signal; training goes on while it is looked into
    UNHEALTHY = "UNHEALTHY"  # reachable, but must not be used
    LOST = "LOST"  # gone until it registers again


@dataclass(frozen=True, slots=True)
class Verdict:
    """The health of a node with the reason in words."""

    health: Health
    reason: str


STAGES = ("detect", "decide", "stop", "plan", "convert", "launch", "restore", "first_step")
"""Stages of a recovery, in order; each ends where the next begins.

detect: the failure -> the first signal of it here, as far as the signal itself tells its age; decide: first signal ->
decision to end the generation (confirming, settling, saving before a planned change); stop: until no worker of it is
left; plan; convert: checkpoint checked and prepared; launch: until every worker runs the training script; restore:
until every worker has its state; first_step: until a step of the new generation is complete.
"""


@dataclass(frozen=True, slots=True)
class IncidentStatus:
    """One incident: first bad signal -> first new training step."""

    number: int
    cause: str
    """For example `node node-2 lost: ...` or `capacity grew: node-2 returned`."""
    from_plan: Plan | None
    to_plan: Plan | None
    from_nodes: int
    to_nodes: int
    reason: str
    """Why the new plan."""
    opened_s: float
    closed_s: float | None
    stages_s: dict[str, float]
    """Seconds by stage (`STAGES`); complete once the incident is closed."""
    failed_step: int
    """Highest step seen before the generation ended."""
    resumed_step: int | None
    """Step of the checkpoint that training went on from (0 = from scratch)."""
    decision: str = ""
    """What was weighed against what, in numbers; empty where there was nothing to choose."""

    @property
    def recovery_s(self) -> float:
        """Seconds from the first bad signal to the first new step: the sum of the stages."""
        return sum(self.stages_s.values())

    @property
    def lost_steps(self) -> int:
        """Steps that had to be computed again."""
        return max(0, self.failed_step - self.resumed_step) if self.resumed_step is not None else 0


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node as the controller sees it."""

    node: str
    verdict: Verdict
    devices: int
    used_devices: int
    ranks: tuple[int, ...]
    pids: tuple[int, ...]
    """Process ids of its workers, in rank order."""
    step: int
    drained: bool
    probes: Probes
    rack: str = ""
    """As the node says; empty = not known."""
    speed: float = 1.0
    """As the node says, relative to what devices of its kind usually do."""


@dataclass(frozen=True, slots=True)
class Rung:
    """The plan that would be taken after the loss of so many of the nodes in use at once, made ahead."""

    losses: int
    plan: Plan | None
    """None when there is no legal plan on what would be left."""
    nodes: int
    """Nodes that the plan uses."""
    reason: str
    """Why this plan, or why there is none."""


@dataclass(frozen=True, slots=True)
class FailureStatus:
    """Why a job FAILED."""

    reason: str
    node: str | None = None
    rank: int | None = None
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """Everything there is to see of a job now."""

    name: str
    phase: Phase
    reason: str
    """Why it is in this phase, in words."""
    generation: int
    plan: Plan | None
    assignment: Assignment | None
    nodes: tuple[NodeStatus, ...]
    step: int
    loss: float | None
    committed_step: int | None
    incidents: tuple[IncidentStatus, ...]
    failure: FailureStatus | None
    time_s: float
    """Unix time of this view."""
    saving: str = ""
    """How often checkpoints are written and why, where the job file leaves it open."""
    saving_s: float | None = None
    """Seconds between saves; None where they go by steps."""
    ladder: tuple[Rung, ...] = ()
    """Plans for the next losses, from one node up; empty until the job has run for a moment."""
