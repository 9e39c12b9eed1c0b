"""A live generation: watched while it starts and runs, ended when it fails or when something better is wanted."""

from __future__ import annotations

from orchestrator.core import capacity, policy, rates
from orchestrator.core.decision import Decision
from orchestrator.core.facts import (
    GenerationEnded,
    GenerationRan,
    GenerationStopping,
    IncidentClosed,
    JobEnded,
)
from orchestrator.core.failure import RootCause, root_cause
from orchestrator.core.fleet import Node, all_in, workers
from orchestrator.core.hang import find_hang
from orchestrator.core.health import SILENT_HEARTBEATS
from orchestrator.core.spec import FailureClass
from orchestrator.core.state import JobState
from orchestrator.core.status import FailureStatus, Phase
from orchestrator.core.types import (
    LaunchReport,
    LaunchState,
    NodeCapacity,
    Plan,
    WorkerState,
)

_DONE = LaunchState.SUCCEEDED
_BROKEN = frozenset({LaunchState.FAILED, LaunchState.STOPPED})


class LiveJob(JobState):
    """STARTING, RUNNING and STOPPING."""

    # ------------------------------------------------------------------ a live generation

    def _watch(self) -> None:
        """STARTING and RUNNING: failures first, then success, then progress, then changes that are wanted."""
        launches = self._launches()
        if self._watch_failures(launches):
            return
        if all_in(launches, LaunchState.SUCCEEDED):
            self._succeed()
            return
        if self.history.ran_s is None:
            self._watch_start(launches)
        if self.history.ran_s is not None:
            self.reason = self._running_reason()
            self._watch_wishes()

    def _watch_failures(self, launches: list[tuple[Node, LaunchReport | None]]) -> bool:
        history = self.history
        doubtful = [
            node
            for node, launch in launches
            if launch is None or ((node.restarted or node.name in history.lost) and launch.state is not _DONE)
        ]
        lost = {node.name: reason for node in doubtful if (reason := self._why_gone(node)) is not None}
        if lost:
            suspected = [self.fleet.nodes[name].suspect_since_s or self.now_s for name in lost]
            cause = root_cause([], lost)
            self._fail(cause.text, FailureClass.HARDWARE, since_s=min(suspected))
            return True
        if any(launch is not None and launch.state in _BROKEN for _, launch in launches):
            cause = self._root_cause()
            raised_s = cause.error.time_s if cause.error else self.now_s
            self._fail(cause.text, cause.kind, detect_s=max(0.0, min(60.0, self.now_s - raised_s)))
            return True
        hang = find_hang(self.history, workers(launches), self.clock.median_s, self.now_s)
        if hang is not None:
            self._fail(hang.text, FailureClass.TRANSIENT, detect_s=hang.age_s)
        return hang is not None

    def _why_gone(self, node: Node) -> str | None:
        """Why an assigned node no longer runs its part of the live generation, or None."""
        history = self.history
        if node.name in history.lost:
            return history.lost[node.name]
        if node.restarted:
            return "its agent restarted"
        if node.report is not None and node.launch_of(history.number) is None:
            # Its peers' first step may be heard of before its own first word about the launch.
            late_s = SILENT_HEARTBEATS * history.spec.recovery.heartbeat_s
            if history.ran_s is not None and node.heard_s - history.ran_s > late_s:
                return "its agent no longer knows the generation"
            if node.launched > history.number:
                return "it runs a newer generation"
        return None

    def _watch_start(self, launches: list[tuple[Node, LaunchReport | None]]) -> None:
        assert self.history.generation is not None
        mesh = self.history.generation.plan.mesh
        states = [worker.state for _, worker in workers(launches)]
        incident = self.history.incident
        if len(states) == mesh.world_size and incident is not None:
            stage = incident.marks[-1][1] if incident.marks else ""
            if stage == "launch" and WorkerState.STARTING not in states:
                self._stage("restore")
            elif stage == "restore" and not {WorkerState.STARTING, WorkerState.RESTORING} & set(states):
                self._stage("first_step")
        if self.max_step > (self.history.generation.checkpoint_step or 0):
            self._ran()

    def _ran(self) -> None:
        self._record(GenerationRan(self.now_s, self.history.number))
        if self.history.incident is not None:
            self._record(IncidentClosed(self.now_s, self.history.incident.number))

    def _running_reason(self) -> str:
        assert self.history.generation is not None
        plan = self.history.generation.plan
        declined = f"; not growing: {self._declined[1]}" if self._declined else ""
        return f"training as {plan.mesh}: {plan.reason}{declined}"

    def _watch_wishes(self) -> None:
        """RUNNING: stop, drain or grow, each by letting the workers save first."""
        history, spec = self.history, self.history.spec
        assert history.generation is not None
        if history.stop_requested:
            self._record(GenerationStopping(self.now_s, history.number, "stopped by order", planned=True))
            self.reason = "saving before the job is stopped by order"
            self._push()
            return
        current = history.generation.assignment.names
        drained = [name for name in current if name in history.drained]
        if drained:
            self._change(f"{', '.join(drained)} drained by order")
            return
        if self._planning is not None or not any(
            node.connected and name not in self._assigned for name, node in self.fleet.nodes.items()
        ):
            return  # nobody could join
        candidates = self._candidates()
        settle_s = spec.recovery.settle_s
        staying = [one for one in candidates if one.node in self._assigned]
        joining = [
            one for one in candidates if one.node not in self._assigned and capacity.settled(one, settle_s, self.now_s)
        ][: max(0, spec.max_nodes - len(current))]
        if not joining or len(staying) < len(current):
            return
        chosen = sorted([*staying, *joining], key=lambda one: one.node)
        nodes = tuple(one.offer for one in chosen)
        if self._declined is None or self._declined[0] != nodes:
            self._ask_for_plan(nodes, growing=True)

    def _consider_growth(self, proposed: Plan, nodes: tuple[NodeCapacity, ...]) -> None:
        history = self.history
        if not history.live or history.stopping or history.ran_s is None or history.generation is None:
            return
        current = history.generation
        horizon_s = rates.mtbf_s(history, len(nodes), self.now_s)
        decision = policy.growth(
            current.plan, proposed, history.spec, cost_s=policy.switch_s(history), horizon_s=horizon_s
        )
        if decision.chosen.name == "stay":
            self._declined = (nodes, decision.reason)
            return
        joining = sorted({one.node for one in nodes} - set(current.assignment.names))
        self._change(f"capacity grew: {', '.join(joining)} joined", decision)

    def _change(self, cause: str, decision: Decision | None = None) -> None:
        """A planned change: the workers save at the next agreed step and exit by themselves."""
        self._open_incident(cause, self.now_s, 0.0)
        if decision is not None:
            self._decide(decision)
        self._record(GenerationStopping(self.now_s, self.history.number, cause, planned=True))
        self.reason = f"saving before a change of plan: {cause}"
        self._push()

    # ------------------------------------------------------------------ ending a generation

    def _fail(self, cause: str, kind: FailureClass, *, since_s: float | None = None, detect_s: float = 0.0) -> None:
        if self.history.incident is None:
            self._open_incident(cause, self.now_s if since_s is None else since_s, detect_s)
        else:
            self._extend(cause)
        self._record(GenerationStopping(self.now_s, self.history.number, cause, kind))
        self._stage("stop")
        self.reason = f"ending generation {self.history.number}: {cause}"
        self._push()

    def _stop(self) -> None:
        stopping = self.history.stopping
        assert stopping is not None
        launches = self._launches()
        if stopping.planned:
            if self._watch_failures(launches):
                return
            if all_in(launches, LaunchState.SUCCEEDED):
                self._succeed()
                return
        still = [n.name for n, _ in launches if n.name not in self.history.lost and not n.is_free_of(stopping.number)]
        if still:
            if stopping.planned and len(still) < len(launches):
                self._stage("stop", once=True)
            return
        cause = None if stopping.planned else self._root_cause(stopping)
        self._end(stopping, cause)

    def _end(self, stopping: GenerationStopping, cause: RootCause | None) -> None:
        history = self.history
        if cause is not None and cause.text not in stopping.cause:
            self._extend(cause.text, instead=stopping.failure is FailureClass.UNKNOWN)
        self._record(
            GenerationEnded(
                self.now_s,
                stopping.number,
                self.max_step,
                cause.text if cause else stopping.cause,
                cause.kind if cause else None,
                cause.signature if cause else "",
                self.clock.median_s or 0.0,
                self._kind(),
            )
        )
        self._growing, self._planning, self._chosen = False, None, None
        self._stage("plan")
        over = policy.exhausted(history, self.now_s) if cause is not None else None
        if over is not None and cause is not None:
            error = cause.error
            failure = FailureStatus(
                f"{over}: {cause.text}", cause.node, error.rank if error else None, error.traceback if error else ""
            )
            self._finish(Phase.FAILED, failure.reason, failure)

    def _root_cause(self, stopping: GenerationStopping | None = None) -> RootCause:
        launches = self._launches()
        lost = {node.name: reason for node, _ in launches if (reason := self._lost_reason(node)) is not None}
        said = [(node.name, launch) for node, launch in launches if launch is not None]
        cause = root_cause(said, lost)
        if stopping is not None and stopping.failure is not None and cause.kind is FailureClass.UNKNOWN:
            return RootCause(stopping.failure, stopping.cause, "", cause.node, cause.error)
        return cause

    def _lost_reason(self, node: Node) -> str | None:
        """Why the node was lost during the live generation; one that had done its part does not count."""
        launch = node.launch_of(self.history.number)
        if launch is not None and launch.state is LaunchState.SUCCEEDED:
            return None
        return self.history.lost.get(node.name) or ("its agent restarted" if node.restarted else None)

    def _succeed(self) -> None:
        if self.saves.committing:
            self.reason = f"done; committing step {max(self.saves.committing)}"
            return
        if self.history.ran_s is None:
            self._ran()
        number = self.history.number
        step_s = self.clock.median_s or 0.0
        done = "the training script is done"
        self._record(GenerationEnded(self.now_s, number, self.max_step, done, step_s=step_s, kind=self._kind()))
        self._finish(Phase.SUCCEEDED, f"the training script is done after step {self.max_step}")

    def _finish(self, phase: Phase, reason: str, failure: FailureStatus | None = None) -> None:
        if phase is Phase.FAILED and failure is None:
            failure = FailureStatus(reason)
        if self.history.incident is not None:
            self._record(IncidentClosed(self.now_s, self.history.incident.number))
        self._record(JobEnded(self.now_s, phase, reason, failure))
        self._planning = self._preparing = self._chosen = None
        self.reason = reason
        self._push()
