"""The durable half of a job's state: the fold of its facts. Replaying a journal gives an equal `History`."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.core.facts import (
    CheckpointRecorded,
    CheckpointRejected,
    DecisionTaken,
    Fact,
    GenerationEnded,
    GenerationRan,
    GenerationStarted,
    GenerationStopping,
    IncidentClosed,
    IncidentExtended,
    IncidentOpened,
    JobAccepted,
    JobEnded,
    NodeDrained,
    NodeLost,
    NodeReturned,
    StageBegan,
    StopRequested,
)
from orchestrator.core.spec import FailureClass, JobSpec
from orchestrator.core.types import Generation, MeasuredPlan, Plan

MEASURED = 50
"""Generations whose steps are remembered."""


@dataclass(slots=True)
class Incident:
    """One recovery as its facts tell it. `marks` are (time, stage) in the order in which the stages began."""

    number: int
    cause: str
    opened_s: float
    detect_s: float
    from_plan: Plan | None
    from_nodes: int
    failed_step: int = 0
    marks: list[tuple[float, str]] = field(default_factory=list)
    decision: str = ""
    """What was weighed against what, in numbers; the last word of several."""
    to: Generation | None = None
    closed_s: float | None = None

    def stages_s(self, now_s: float) -> dict[str, float]:
        """Seconds per stage; a stage entered twice (a failure during recovery) counts both times."""
        seconds = {"detect": self.detect_s}
        ends = [time_s for time_s, _ in self.marks[1:]]
        ends.append(now_s if self.closed_s is None else self.closed_s)
        for (began_s, stage), ended_s in zip(self.marks, ends, strict=True):
            seconds[stage] = seconds.get(stage, 0.0) + max(0.0, ended_s - began_s)
        return seconds


@dataclass(frozen=True, slots=True)
class Failure:
    """One counted failure, for the budgets."""

    time_s: float
    kind: FailureClass
    signature: str


@dataclass(slots=True)
class History:
    """What is known of a job for good.

    Invariants: `generation.number` only grows; at most one generation is live; the newest usable checkpoint's step
    never decreases except by a recorded rejection.
    """

    spec: JobSpec
    accepted_s: float = 0.0
    after_generation: int = 0
    """Numbers up to this one are taken by earlier runs."""
    generation: Generation | None = None
    """Newest generation, live or not."""
    live: bool = False
    """True from its start until no worker of it is left."""
    ran_s: float | None = None
    """When the newest generation completed its first step; None before."""
    started_s: float = 0.0
    stopping: GenerationStopping | None = None
    """Set while the live generation is being ended."""
    max_step: int = 0
    """Highest step ever reached, as far as ended generations tell."""
    checkpoints: list[CheckpointRecorded] = field(default_factory=list)
    """Committed and not rejected, oldest first; at most `spec.checkpoint.keep_last`, older ones are pruned."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Path -> why the checkpoint is unusable."""
    failures: list[Failure] = field(default_factory=list)
    fruitless: int = 0
    """Consecutive generations that ended, not for want of a node, before their first step or at the very step at which
    the one before had ended, and without a new checkpoint."""
    failed_step: int = -1
    """Step at which the last generation failed that was not ended by the loss of a node."""
    committed_at_start: int = -1
    lost: dict[str, str] = field(default_factory=dict)
    """Nodes given up and not yet back -> reason."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Node -> times at which it was given up: flapping nodes are held back longer."""
    returns: list[float] = field(default_factory=list)
    """Seconds that lost nodes stayed away, in the order in which they came back."""
    drained: set[str] = field(default_factory=set)
    measured: list[MeasuredPlan] = field(default_factory=list)
    """Steps of ended generations, oldest first; as many as `MEASURED`."""
    incidents: list[Incident] = field(default_factory=list)
    stop_requested: bool = False
    ended: JobEnded | None = None

    @property
    def number(self) -> int:
        """Number of the newest generation; before the first, that of the last earlier run (0 if there was none)."""
        return self.generation.number if self.generation else self.after_generation

    @property
    def incident(self) -> Incident | None:
        """The incident that is open now."""
        return self.incidents[-1] if self.incidents and self.incidents[-1].closed_s is None else None

    @property
    def checkpoint(self) -> CheckpointRecorded | None:
        """Newest committed checkpoint that has not been found unusable."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def committed_step(self) -> int | None:
        """Step of `checkpoint`."""
        return self.checkpoint.step if self.checkpoint else None

    @property
    def newest_step(self) -> int:
        """`committed_step`, or -1: less than every step."""
        return self.checkpoint.step if self.checkpoint else -1

    def apply(self, fact: Fact) -> None:
        """Fold one fact in. Facts are trusted: they were decided by `Job` and come from its journal."""
        match fact:
            case JobAccepted():
                self.spec, self.accepted_s, self.after_generation = fact.spec, fact.time_s, fact.after_generation
            case GenerationStarted():
                self._start(fact)
            case GenerationRan():
                self.ran_s = fact.time_s
            case GenerationStopping():
                self.stopping = fact
            case GenerationEnded():
                self._end(fact)
            case CheckpointRecorded():
                self.checkpoints = [*self.checkpoints, fact][-self.spec.checkpoint.keep_last :]
            case CheckpointRejected():
                self.rejected[fact.path] = fact.reason
                self.checkpoints = [kept for kept in self.checkpoints if kept.path != fact.path]
            case NodeLost():
                self.lost[fact.node] = fact.reason
                self.losses.setdefault(fact.node, []).append(fact.time_s)
            case NodeReturned():
                self.lost.pop(fact.node, None)
                if self.losses.get(fact.node):
                    self.returns.append(fact.time_s - self.losses[fact.node][-1])
            case NodeDrained():
                (self.drained.add if fact.drained else self.drained.discard)(fact.node)
            case StopRequested():
                self.stop_requested = True
            case JobEnded():
                self.ended, self.live, self.stopping = fact, False, None
            case IncidentOpened() | IncidentExtended() | DecisionTaken() | StageBegan() | IncidentClosed():
                self._apply_incident(fact)

    def _start(self, fact: GenerationStarted) -> None:
        self.generation, self.live, self.ran_s = fact.generation, True, None
        self.started_s, self.stopping = fact.time_s, None
        self.committed_at_start = self.newest_step
        if self.incident:
            self.incident.to = fact.generation

    def _end(self, fact: GenerationEnded) -> None:
        self.live, self.stopping = False, None
        if self.generation and fact.step_s > 0 and fact.kind:
            one = MeasuredPlan(self.generation.plan, self.generation.assignment, fact.kind, fact.step_s)
            self.measured = [*self.measured, one][-MEASURED:]
        committed = self.newest_step
        started = self.generation.checkpoint_step or 0 if self.generation else 0
        stuck = fact.step <= started or fact.step == self.failed_step
        if fact.failure is None or committed > self.committed_at_start:
            self.fruitless = 0
        elif fact.failure is not FailureClass.HARDWARE:
            self.fruitless = self.fruitless + 1 if stuck else 0
            self.failed_step = fact.step
        self.max_step = max(self.max_step, fact.step)
        if fact.failure is not None:
            self.failures.append(Failure(fact.time_s, fact.failure, fact.signature))
        if self.incident:
            self.incident.failed_step = max(self.incident.failed_step, fact.step)

    def _apply_incident(
        self, fact: IncidentOpened | IncidentExtended | DecisionTaken | StageBegan | IncidentClosed
    ) -> None:
        if isinstance(fact, IncidentOpened):
            running = self.generation if self.live else None
            self.incidents.append(
                Incident(
                    number=fact.number,
                    cause=fact.cause,
                    opened_s=fact.time_s,
                    detect_s=fact.detect_s,
                    from_plan=running.plan if running else None,
                    from_nodes=len(running.assignment.nodes) if running else 0,
                )
            )
            return
        incident = self.incidents[-1]
        match fact:
            case IncidentExtended():
                incident.cause = fact.cause if fact.instead else f"{incident.cause}; then {fact.cause}"
            case DecisionTaken():
                incident.decision = fact.reason
            case StageBegan():
                incident.marks.append((fact.time_s, fact.stage))
            case IncidentClosed():
                incident.closed_s = fact.time_s


def replay(facts: list[Fact]) -> History:
    """The history that these facts tell; the first must be `JobAccepted` (ValueError otherwise)."""
    if not facts or not isinstance(facts[0], JobAccepted):
        raise ValueError("a journal begins with JobAccepted")
    history = History(spec=facts[0].spec)
    for fact in facts:
        history.apply(fact)
    return history
