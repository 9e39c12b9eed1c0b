"""What there is to see of a job: `JobStatus` from its state. Nothing is decided here."""

from __future__ import annotations

from orchestrator.core.fleet import Node
from orchestrator.core.history import Incident
from orchestrator.core.job import Job
from orchestrator.core.status import IncidentStatus, JobStatus, NodeStatus
from orchestrator.core.types import Probes, WorkerState


def summarize(job: Job) -> JobStatus:
    """The view of the job at the time of its last event."""
    history = job.history
    shown = history.generation if history.live or history.ended else None
    return JobStatus(
        name=history.spec.name,
        phase=job.phase,
        reason=history.ended.reason if history.ended else job.reason,
        generation=history.number,
        plan=shown.plan if shown else None,
        assignment=shown.assignment if shown else None,
        nodes=tuple(_node(job, node) for node in sorted(job.fleet.nodes.values(), key=lambda one: one.name)),
        step=job.max_step,
        loss=job.loss[1] if job.loss else None,
        committed_step=history.committed_step,
        incidents=tuple(_incident(incident, job.now_s) for incident in history.incidents),
        failure=history.ended.failure if history.ended else None,
        time_s=job.now_s,
        saving=job.save_every.reason if job.save_every else "",
        saving_s=job.save_every.seconds if job.save_every else history.spec.checkpoint.every_s,
    )


def _node(job: Job, node: Node) -> NodeStatus:
    history, report = job.history, node.report
    part = history.generation.assignment.of(node.name) if history.live and history.generation else None
    launch = node.launch_of(history.number)
    workers = sorted(launch.workers, key=lambda worker: worker.rank) if launch and history.live else []
    alive = [worker for worker in workers if worker.state is not WorkerState.EXITED]
    return NodeStatus(
        node=node.name,
        verdict=job.verdict(node),
        devices=report.devices if report else 0,
        used_devices=part.devices if part else 0,
        ranks=tuple(range(part.first_rank, part.first_rank + part.devices)) if part else (),
        pids=tuple(worker.pid for worker in alive),
        step=max((worker.step for worker in workers), default=0),
        drained=node.name in history.drained,
        probes=report.probes if report else Probes(),
        rack=report.rack if report else "",
        speed=report.speed if report else 1.0,
    )


def _incident(incident: Incident, now_s: float) -> IncidentStatus:
    to = incident.to
    resumed = None if to is None else to.checkpoint_step or 0
    return IncidentStatus(
        number=incident.number,
        cause=incident.cause,
        from_plan=incident.from_plan,
        to_plan=to.plan if to else None,
        from_nodes=incident.from_nodes,
        to_nodes=len(to.assignment.nodes) if to else 0,
        reason=to.plan.reason if to else "",
        opened_s=incident.opened_s,
        closed_s=incident.closed_s,
        stages_s=incident.stages_s(now_s),
        failed_step=incident.failed_step,
        resumed_step=resumed,
        decision=incident.decision,
    )
