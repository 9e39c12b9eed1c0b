"""Prometheus metrics of one controller, fed by the facts it records and the views it publishes."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from orchestrator.core.facts import CheckpointRecorded, DecisionTaken, Fact, GenerationEnded, IncidentClosed
from orchestrator.core.job import Job
from orchestrator.core.status import STAGES, Health, JobStatus, Phase
from orchestrator.core.types import SaveReport

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """All metrics of a controller, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        job, registry = ["job"], self.registry
        self.generation = Gauge("regrow_generation", "Number of the newest generation.", job, registry=registry)
        self.phase = Gauge("regrow_phase", "1 for the phase the job is in.", ["job", "phase"], registry=registry)
        self.used = Gauge("regrow_devices_used", "Devices that the live plan uses.", job, registry=registry)
        self.healthy = Gauge("regrow_devices_healthy", "Devices of HEALTHY nodes.", job, registry=registry)
        self.step = Gauge("regrow_step", "Completed steps.", job, registry=registry)
        self.loss = Gauge("regrow_loss", "Newest global mean loss.", job, registry=registry)
        self.committed = Gauge("regrow_committed_step", "Newest committed step.", job, registry=registry)
        self.lost_steps = Counter("regrow_steps_lost", "Steps computed again after failures.", job, registry=registry)
        self.incidents = Counter("regrow_incidents", "Closed incidents.", job, registry=registry)
        self.failures = Counter("regrow_failures", "Failed generations by class.", ["job", "kind"], registry=registry)
        self.decisions = Counter(
            "regrow_decisions", "Choices among waiting, spares, shrinking and growing.", ["job", "choice"],
            registry=registry,
        )  # fmt: skip
        self.interval = Gauge(
            "regrow_checkpoint_interval_seconds", "Seconds between saves, where saves go by time.", job,
            registry=registry,
        )  # fmt: skip
        self.recovery = Histogram(
            "regrow_recovery_seconds",
            "Seconds per stage of a closed incident; stage total is their sum.",
            ["job", "stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.checkpoint = Histogram(
            "regrow_checkpoint_seconds",
            "Seconds per rank's part: stall (training stood still), write (until durable).",
            ["job", "kind"],
            buckets=SECONDS,
            registry=registry,
        )
        self.checkpoint_bytes = Counter("regrow_checkpoint_bytes", "Bytes committed.", job, registry=registry)
        self.last_bytes = Gauge("regrow_checkpoint_last_bytes", "Size of the newest.", job, registry=registry)
        self.goodput = Counter("regrow_goodput_seconds", "Time spent on steps done for the first time.", job,
                               registry=registry)  # fmt: skip
        self.badput = Counter("regrow_badput_seconds", "Time spent on anything else, by cause.", ["job", "cause"],
                              registry=registry)  # fmt: skip
        self._mark_s: float | None = None
        self._stall_s = 0.0
        """Stalls counted as badput already, to be taken off the next step's time."""
        self._phase = Phase.WAITING
        self._step = 0

    def record(self, fact: Fact, job: Job) -> None:
        """Count what a fact tells."""
        name = job.history.spec.name
        match fact:
            case GenerationEnded() if fact.failure is not None:
                self.failures.labels(name, fact.failure.value).inc()
            case DecisionTaken():
                self.decisions.labels(name, fact.choice).inc()
            case CheckpointRecorded():
                self.checkpoint_bytes.labels(name).inc(fact.size_bytes)
                self.last_bytes.labels(name).set(fact.size_bytes)
            case IncidentClosed():
                incident = job.history.incidents[-1]
                stages = incident.stages_s(fact.time_s)
                for stage in STAGES:
                    self.recovery.labels(name, stage).observe(stages.get(stage, 0.0))
                self.recovery.labels(name, "total").observe(sum(stages.values()))
                self.incidents.labels(name).inc()
                resumed = incident.to.checkpoint_step or 0 if incident.to else incident.failed_step
                self.lost_steps.labels(name).inc(max(0, incident.failed_step - resumed))
            case _:
                pass

    def committed_parts(self, name: str, parts: tuple[SaveReport, ...]) -> None:
        """Count the parts of a save that is about to be committed."""
        for part in parts:
            self.checkpoint.labels(name, "stall").observe(part.stall_s)
            self.checkpoint.labels(name, "write").observe(part.write_s)
        stall_s = max(part.stall_s for part in parts)
        self.badput.labels(name, "checkpoint_stall").inc(stall_s)
        self._stall_s += stall_s

    def show(self, status: JobStatus, reached_step: int) -> None:
        """Publish a view. `reached_step`: highest step of earlier generations; steps up to it are done again."""
        name = status.name
        self.generation.labels(name).set(status.generation)
        for phase in Phase:
            self.phase.labels(name, phase.value).set(phase is status.phase)
        self.used.labels(name).set(sum(node.used_devices for node in status.nodes))
        healthy = [node.devices for node in status.nodes if node.verdict.health is Health.HEALTHY]
        self.healthy.labels(name).set(sum(healthy))
        self.step.labels(name).set(status.step)
        self.committed.labels(name).set(status.committed_step or 0)
        if status.saving_s is not None:
            self.interval.labels(name).set(status.saving_s)
        if status.loss is not None:
            self.loss.labels(name).set(status.loss)
        self._account(status, reached_step)

    def _account(self, status: JobStatus, reached_step: int) -> None:
        """Divide the time since the last view: a step's time is known to be good only once the step is done."""
        now_s, before = status.time_s, self._phase
        if self._mark_s is None:
            self._mark_s = now_s
        running = status.phase is Phase.RUNNING and before is Phase.RUNNING
        if running and status.step <= self._step:
            return
        elapsed_s = max(0.0, now_s - self._mark_s)
        if running:
            counted_s = min(elapsed_s, self._stall_s)
            elapsed_s, self._stall_s = elapsed_s - counted_s, self._stall_s - counted_s
        if running and status.step > reached_step:
            self.goodput.labels(status.name).inc(elapsed_s)
        elif running:
            self.badput.labels(status.name, "lost_work").inc(elapsed_s)
        elif not before.ended:
            cause = "undetected" if before is Phase.RUNNING else before.value.lower()
            self.badput.labels(status.name, cause).inc(elapsed_s)
        self._mark_s, self._phase, self._step = now_s, status.phase, status.step
