"""What the journal holds: everything about the job that cannot be observed again.

`Job.handle` returns each fact inside a `Record` command, which the controller makes durable before it acts on anything
else that the same event brought. `History.apply` folds facts into the state that survives a restart.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.spec import FailureClass, JobSpec
from orchestrator.core.status import FailureStatus, Phase
from orchestrator.core.types import Generation


@dataclass(frozen=True, slots=True)
class JobAccepted:
    """First fact of every job."""

    time_s: float
    spec: JobSpec
    after_generation: int = 0
    """Earlier runs with the same agents or checkpoints used the numbers up to this one: count on from here."""


@dataclass(frozen=True, slots=True)
class GenerationStarted:
    """The next generation is ordered; `reason` says why this plan."""

    time_s: float
    generation: Generation


@dataclass(frozen=True, slots=True)
class GenerationRan:
    """The generation completed its first step (or all there was left to do)."""

    time_s: float
    number: int


@dataclass(frozen=True, slots=True)
class GenerationStopping:
    """The generation is to end. `planned`: its workers save and exit by themselves first."""

    time_s: float
    number: int
    cause: str
    failure: FailureClass | None = None
    """Preliminary: what the workers tell once they have ended may say better. None = planned."""
    planned: bool = False


@dataclass(frozen=True, slots=True)
class GenerationEnded:
    """No worker of the generation is left. `failure` None = it was ended on purpose or succeeded."""

    time_s: float
    number: int
    step: int
    """Highest step that it was seen to reach."""
    cause: str
    failure: FailureClass | None = None
    signature: str = ""
    """Same signature twice = same error at the same step."""
    step_s: float = 0.0
    """Median seconds of a step; 0 = too few were seen."""
    kind: str = ""
    """Of its devices; empty where they are of several kinds, whose steps say nothing of either."""


@dataclass(frozen=True, slots=True)
class CheckpointRecorded:
    """A checkpoint is committed under `path` (relative to the root)."""

    time_s: float
    generation: int
    step: int
    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CheckpointRejected:
    """A committed checkpoint turned out to be unusable."""

    time_s: float
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node was given up."""

    time_s: float
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class NodeReturned:
    """A lost node has registered again."""

    time_s: float
    node: str


@dataclass(frozen=True, slots=True)
class NodeDrained:
    """A user's standing order about a node."""

    time_s: float
    node: str
    drained: bool


@dataclass(frozen=True, slots=True)
class IncidentOpened:
    """First bad signal (`time_s`), seen `detect_s` after what it tells of."""

    time_s: float
    number: int
    cause: str
    detect_s: float


@dataclass(frozen=True, slots=True)
class IncidentExtended:
    """Something more went wrong before the first new step, or (`instead`) the cause became known better."""

    time_s: float
    number: int
    cause: str
    instead: bool = False


@dataclass(frozen=True, slots=True)
class DecisionTaken:
    """What could have been done in an incident was weighed; `reason` has the numbers."""

    time_s: float
    number: int
    choice: str
    """`wait`, `use spare`, `shrink` or `grow`."""
    reason: str


@dataclass(frozen=True, slots=True)
class StageBegan:
    """The recovery entered a stage; the one before ends here."""

    time_s: float
    number: int
    stage: str


@dataclass(frozen=True, slots=True)
class IncidentClosed:
    """The first new step is done (or the job has ended)."""

    time_s: float
    number: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """A user has ordered the end of the job."""

    time_s: float


@dataclass(frozen=True, slots=True)
class JobEnded:
    """Last fact of every job."""

    time_s: float
    phase: Phase
    reason: str
    failure: FailureStatus | None = None


Fact = (
    JobAccepted
    | GenerationStarted
    | GenerationRan
    | GenerationStopping
    | GenerationEnded
    | CheckpointRecorded
    | CheckpointRejected
    | NodeLost
    | NodeReturned
    | NodeDrained
    | IncidentOpened
    | IncidentExtended
    | DecisionTaken
    | StageBegan
    | IncidentClosed
    | StopRequested
    | JobEnded
)
