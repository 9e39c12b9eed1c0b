"""The state machine: `Job.handle(event) -> commands`. No clock, no I/O; same events, same commands.

    WAITING -> (plan) -> CONVERTING -> (generation) -> STARTING -> RUNNING -> STOPPING -> WAITING ...

Level-based: every event updates what is observed, then `_advance` compares what is with what should be and takes at
most a few transitions. What must survive a restart becomes a fact (`Record`); `history` is the fold of those facts.
"""

from __future__ import annotations

from orchestrator.core import capacity, policy
from orchestrator.core.commands import (
    Command,
    CommitCheckpoint,
    FenceCheckpoints,
    MakePlan,
    PrepareCheckpoint,
    PruneCheckpoints,
    Push,
    Record,
)
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointPrepared,
    CheckpointUnusable,
    CommitFailed,
    DrainOrdered,
    Event,
    NodeDisconnected,
    NodeReported,
    PlanImpossible,
    PlanMade,
    StopOrdered,
    Tick,
)
from orchestrator.core.facts import (
    CheckpointRecorded,
    CheckpointRejected,
    Fact,
    GenerationEnded,
    GenerationRan,
    GenerationStarted,
    GenerationStopping,
    IncidentClosed,
    IncidentExtended,
    IncidentOpened,
    JobEnded,
    NodeDrained,
    NodeLost,
    NodeReturned,
    StageBegan,
    StopRequested,
)
from orchestrator.core.failure import RootCause, root_cause
from orchestrator.core.fleet import Fleet, Node, StepClock, all_in, workers
from orchestrator.core.hang import find_hang
from orchestrator.core.health import Signals, verdict
from orchestrator.core.history import History
from orchestrator.core.saves import Saves
from orchestrator.core.spec import FailureClass
from orchestrator.core.status import FailureStatus, Health, Phase, Verdict
from orchestrator.core.types import (
    Assignment,
    Directive,
    Generation,
    LaunchOrder,
    LaunchReport,
    LaunchState,
    NodeCapacity,
    NodeReport,
    Plan,
    WorkerState,
)

FIRST_SETTLE = 5
"""The very first plan waits this many settle windows for `max_nodes` to register, later ones do not."""


class Job:
    """One job: durable `history`, observed `fleet`, and the requests that are under way."""

    def __init__(self, history: History, now_s: float) -> None:
        self.history = history
        self.fleet = Fleet()
        self.saves = Saves(generation=history.number)
        self.clock = StepClock()
        self.now_s = self.opened_s = now_s
        self.reason = "the controller has just started"
        self.max_step = 0
        """Highest step that the newest generation was seen to reach."""
        self.loss: tuple[int, float] | None = None
        """Newest (step, loss)."""
        self._assigned: frozenset[str] = (
            frozenset(history.generation.assignment.names) if history.generation else frozenset()
        )
        """Nodes of the newest generation, as a set."""
        self._failed: frozenset[str] = frozenset()
        """Nodes of the live generation whose workers have failed."""
        self._commands: list[Command] = []
        self._requests = 0
        self._planning: MakePlan | None = None
        self._growing = False
        self._no_plan: tuple[tuple[NodeCapacity, ...], str] | None = None
        self._declined: tuple[tuple[NodeCapacity, ...], str] | None = None
        self._chosen: tuple[Plan, Assignment] | None = None
        self._preparing: PrepareCheckpoint | None = None
        self._quiet_since_s = now_s
        """When the set of usable nodes last changed."""
        self._usable_names: tuple[str, ...] = ()
        for part in history.generation.assignment if history.live and history.generation else ():
            self.fleet.expect(part.node, now_s)

    # ------------------------------------------------------------------ what it is asked

    @property
    def phase(self) -> Phase:
        """Where the job stands."""
        history = self.history
        if history.ended:
            return history.ended.phase
        if history.live:
            if history.stopping:
                return Phase.STOPPING
            return Phase.STARTING if history.ran_s is None else Phase.RUNNING
        return Phase.CONVERTING if self._preparing else Phase.WAITING

    def directive(self, node: str) -> Directive:
        """What should be on `node` now."""
        history = self.history
        launch, pause = None, False
        part = history.generation.assignment.of(node) if history.generation else None
        if history.live and part is not None and (history.stopping is None or history.stopping.planned):
            launch = self._order()
            pause = history.stopping is not None
        return Directive(
            generation=history.number,
            launch=launch,
            pause=pause,
            committed_step=history.committed_step,
            heartbeat_s=history.spec.recovery.heartbeat_s,
        )

    def verdict(self, node: Node) -> Verdict:
        """The health of a node now."""
        assigned = self.history.live and node.name in self._assigned
        return verdict(
            Signals(
                connected=node.connected,
                silence_s=self.now_s - node.heard_s,
                peers_failed=assigned and bool(self._failed - {node.name}),
                starting=assigned and self.phase is Phase.STARTING,
                lost_reason=self.history.lost.get(node.name),
            ),
            self.history.spec.recovery,
        )

    def _order(self) -> LaunchOrder:
        history, spec = self.history, self.history.spec
        assert history.generation is not None
        path = next((c.path for c in history.checkpoints if c.step == history.generation.checkpoint_step), None)
        return LaunchOrder(
            job=spec.name,
            generation=history.generation,
            entrypoint=spec.entrypoint,
            checkpoint_uri=spec.checkpoint.uri,
            checkpoint_path=path,
            save_every_s=spec.checkpoint.every_s,
            save_every_steps=spec.checkpoint.every_steps,
            store=self._store(),
            seed=spec.seed,
            environment=spec.environment,
        )

    def _store(self) -> str | None:
        assert self.history.generation is not None
        host = self.fleet.nodes.get(self.history.generation.assignment.nodes[0].node)
        launch = host.launch_of(self.history.number) if host else None
        return launch.store if launch else None

    # ------------------------------------------------------------------ events

    def handle(self, event: Event) -> list[Command]:
        """Take in one event; returns what to do, `Record`s first in force (see `commands`)."""
        self.now_s = max(self.now_s, event.time_s)
        self._commands = []
        if self._observe(event) and not self.history.ended:
            self._judge_nodes()
            self._commit()
            for _ in range(10):
                before = len(self._commands)
                self._advance()
                if len(self._commands) == before:
                    break
        return self._commands

    def _observe(self, event: Event) -> bool:
        """Take in what the event tells; False when it can wait for the next tick.

        With a thousand nodes, looking at all of them for each of their heartbeats would be quadratic.
        """
        match event:
            case NodeReported():
                return self._observe_report(event.report)
            case NodeDisconnected():
                self.fleet.disconnect(event.node, event.instance, self.now_s)
            case PlanMade() | PlanImpossible():
                self._observe_plan(event)
            case CheckpointPrepared() | CheckpointUnusable():
                self._observe_prepared(event)
            case CheckpointCommitted() | CommitFailed():
                self._observe_commit(event)
            case DrainOrdered():
                if (event.node in self.history.drained) != event.drained:
                    self._record(NodeDrained(self.now_s, event.node, event.drained))
            case StopOrdered():
                if not self.history.stop_requested and not self.history.ended:
                    self._record(StopRequested(self.now_s))
            case Tick():
                pass
        return True

    def _observe_report(self, report: NodeReport) -> bool:
        history = self.history
        known = self.fleet.nodes.get(report.node)
        before = known.report if known else None
        assigned = history.live and report.node in self._assigned
        store = self._store() if history.generation else None
        self.fleet.observe(report, self.now_s, history.number if assigned else None)
        if report.node in history.lost:
            self._record(NodeReturned(self.now_s, report.node))
            self.fleet.nodes[report.node].joined_s = self.now_s
        launch = report.launch
        if not history.generation or launch is None or launch.generation != history.number:
            return True
        self.saves.add(launch.saves, -1 if history.committed_step is None else history.committed_step)
        steps = [worker.step for worker in launch.workers] + [error.step for error in launch.errors]
        if steps:
            self.max_step = max(self.max_step, *steps)
            self.clock.observe(self.max_step, self.now_s)
            losses = [worker.loss for worker in launch.workers if worker.loss is not None]
            if losses:
                self.loss = (self.max_step, losses[-1])
        if self._store() != store:
            self._push()
        ordinary = self.phase is Phase.RUNNING and launch.state is LaunchState.RUNNING and not launch.saves
        return not ordinary or before is None or before.instance != report.instance

    def _observe_plan(self, event: PlanMade | PlanImpossible) -> None:
        request = self._planning
        if request is None or request.request != event.request:
            return
        self._planning = None
        if isinstance(event, PlanImpossible):
            if self._growing:
                self._declined = (request.nodes, event.reason)
            else:
                self._no_plan = (request.nodes, event.reason)
        elif self._growing:
            self._consider_growth(event.plan, request.nodes)
        else:
            self._chosen = (event.plan, event.assignment)

    def _observe_prepared(self, event: CheckpointPrepared | CheckpointUnusable) -> None:
        request = self._preparing
        if request is None or request.request != event.request:
            return
        self._preparing = None
        if isinstance(event, CheckpointPrepared):
            self._start()
            return
        self._record(CheckpointRejected(self.now_s, request.path, event.reason))
        if not self.history.checkpoints:
            self._finish(Phase.FAILED, f"no usable checkpoint is left; the last one: {event.reason}")

    def _observe_commit(self, event: CheckpointCommitted | CommitFailed) -> None:
        history = self.history
        if event.generation != self.saves.generation:
            return
        committed = isinstance(event, CheckpointCommitted)
        self.saves.settle(event.step, committed=committed)
        if isinstance(event, CheckpointCommitted) and event.step > (history.committed_step or -1):
            self._record(
                CheckpointRecorded(self.now_s, event.generation, event.step, event.path, event.size_bytes),
            )
            keep = history.spec.checkpoint.keep_last
            kept = tuple(one.path for one in history.checkpoints[-keep:])
            restoring = self._order().checkpoint_path
            self._emit(PruneCheckpoints(keep, kept + ((restoring,) if restoring else ()), history.number))
            self._push()

    # ------------------------------------------------------------------ verdicts and saves

    def _judge_nodes(self) -> None:
        self._failed = self._failed_nodes()
        for node in self.fleet.nodes.values():
            judged = self.verdict(node)
            if judged.health is Health.LOST and node.name not in self.history.lost:
                if node.report is None and node.name not in self._assigned:
                    continue
                self._record(NodeLost(self.now_s, node.name, judged.reason))

    def _failed_nodes(self) -> frozenset[str]:
        """Nodes of the live generation whose workers have failed."""
        if not self.history.live:
            return frozenset()
        launches = self._launches()
        return frozenset(node.name for node, launch in launches if launch and launch.state is LaunchState.FAILED)

    def _commit(self) -> None:
        history = self.history
        if history.generation is None:
            return
        for step, parts in self.saves.complete(history.generation.plan.mesh.world_size):
            self.saves.committing.add(step)
            self._emit(CommitCheckpoint(history.number, step, history.generation.plan.mesh.world_size, parts))

    # ------------------------------------------------------------------ transitions

    def _advance(self) -> None:
        match self.phase:
            case Phase.WAITING:
                self._wait()
            case Phase.CONVERTING:
                self._convert()
            case Phase.STARTING | Phase.RUNNING:
                self._watch()
            case Phase.STOPPING:
                self._stop()
            case Phase.SUCCEEDED | Phase.FAILED:
                pass

    def _wait(self) -> None:
        history, spec = self.history, self.history.spec
        if self.saves.committing:
            self.reason = f"committing step {max(self.saves.committing)}"
            return
        if history.stop_requested:
            self._finish(Phase.FAILED, f"stopped by order; the newest checkpoint is of step {history.committed_step}")
            return
        nodes = capacity.choose(self._candidates(), spec, self.now_s, self._last_names())
        if self._chosen is not None:
            self._take_plan(self._chosen)
            return
        if (reason := self._why_not_plan(nodes)) is not None:
            self.reason = reason
            self._planning = None
        elif self._no_plan is not None and self._no_plan[0] == nodes:
            self.reason = f"no legal plan for {_nodes(len(nodes))}: {self._no_plan[1]}"
        elif self._planning is None or self._planning.nodes != nodes:
            self._ask_for_plan(nodes, growing=False)
            self.reason = f"planning for {_nodes(len(nodes))}"

    def _why_not_plan(self, nodes: tuple[NodeCapacity, ...]) -> str | None:
        history, spec = self.history, self.history.spec
        if len(nodes) < spec.min_nodes:
            return f"{len(nodes)} of at least {spec.min_nodes} nodes are fit to train: waiting for more"
        settle_s = spec.recovery.settle_s
        if history.generation is None:
            quiet_s = self.now_s - self._quiet_since_s
            if len(nodes) < spec.max_nodes and quiet_s < FIRST_SETTLE * settle_s:
                return f"{len(nodes)} of up to {spec.max_nodes} nodes have registered: waiting for the others"
            return None
        before = len(history.generation.assignment.nodes)
        known = {one.node for one in nodes}
        expected = [
            name for name in self._last_names() if name not in history.lost | dict.fromkeys(history.drained, "")
        ]
        absent = [name for name in expected if name not in known and self.fleet.expect(name, self.now_s).report is None]
        if absent and self.now_s - self.opened_s < max(settle_s, history.spec.recovery.lost_after_s):
            return f"the controller has just started: waiting for {', '.join(absent)} to register again"
        patience_s = spec.recovery.wait_for_replacement_s
        losses = [lost[-1] for node, lost in history.losses.items() if node in history.lost]
        if len(nodes) < before and losses and self.now_s - max(losses) < patience_s:
            return f"waiting up to {patience_s:g} s for a replacement: {len(nodes)} of {before} nodes are left"
        return None

    def _take_plan(self, chosen: tuple[Plan, Assignment]) -> None:
        """The plan is there: prepare its checkpoint, unless the nodes have changed meanwhile."""
        plan, assignment = chosen
        usable = {one.node for one in self._candidates()}
        if not usable.issuperset(assignment.names):
            self._chosen = None
            return
        checkpoint = self.history.checkpoint
        if checkpoint is None:
            self._start()
            return
        self._requests += 1
        self._preparing = PrepareCheckpoint(self._requests, checkpoint.step, checkpoint.path, plan)
        self._stage("convert")
        self._emit(self._preparing)
        self.reason = f"preparing the checkpoint of step {checkpoint.step} for {plan.mesh}"

    def _convert(self) -> None:
        assert self._chosen is not None
        usable = {one.node for one in self._candidates()}
        missing = sorted(set(self._chosen[1].names) - usable)
        if missing or self.history.stop_requested:
            self._preparing, self._chosen = None, None
            if missing:
                self._extend(f"{', '.join(missing)} no longer fit to train")
                self._stage("plan")

    def _start(self) -> None:
        assert self._chosen is not None
        plan, assignment = self._chosen
        self._chosen = None
        usable = {one.node for one in self._candidates()}
        if not usable.issuperset(assignment.names):
            self._stage("plan")
            return
        number = self.history.number + 1
        generation = Generation(number, plan, assignment, self.history.committed_step)
        self._record(GenerationStarted(self.now_s, generation))
        self._emit(FenceCheckpoints(number))
        self.saves.begin(number)
        self._assigned = frozenset(assignment.names)
        self.clock = StepClock()
        self.max_step = generation.checkpoint_step or 0
        self._declined = None
        for part in assignment:
            self.fleet.nodes[part.node].restarted = False
        self._stage("launch")
        self._push()
        self.reason = f"launching {plan.mesh} on {_nodes(len(assignment.nodes))}: {plan.reason}"

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
        done = {node.name for node, launch in launches if launch and launch.state is LaunchState.SUCCEEDED}
        gone = {node.name: self._why_gone(node) for node, _ in launches if node.name not in done}
        lost = {name: reason for name, reason in gone.items() if reason is not None}
        if lost:
            suspected = [self.fleet.nodes[name].suspect_since_s or self.now_s for name in lost]
            cause = root_cause([], lost)
            self._fail(cause.text, FailureClass.HARDWARE, since_s=min(suspected))
            return True
        if any(launch and launch.state in {LaunchState.FAILED, LaunchState.STOPPED} for _, launch in launches):
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
            if history.ran_s is not None:
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
        candidates = self._candidates()
        settle_s = spec.recovery.settle_s
        staying = [one for one in candidates if one.node in current]
        joining = [
            one for one in candidates if one.node not in current and capacity.settled(one, settle_s, self.now_s)
        ][: max(0, spec.max_nodes - len(current))]
        if not joining or len(staying) < len(current) or self._planning is not None:
            return
        chosen = sorted([*staying, *joining], key=lambda one: one.node)
        nodes = tuple(capacity.to_capacity(one, spec) for one in chosen)
        if self._declined is None or self._declined[0] != nodes:
            self._ask_for_plan(nodes, growing=True)

    def _consider_growth(self, proposed: Plan, nodes: tuple[NodeCapacity, ...]) -> None:
        history = self.history
        if not history.live or history.stopping or history.ran_s is None or history.generation is None:
            return
        current = history.generation
        decision = policy.worth_switching(current.plan, proposed, policy.switch_s(history))
        if not decision.yes:
            self._declined = (nodes, decision.reason)
            return
        joining = sorted({one.node for one in nodes} - set(current.assignment.names))
        self._change(f"capacity grew: {', '.join(joining)} joined ({decision.reason})")

    def _change(self, cause: str) -> None:
        """A planned change: the workers save at the next agreed step and exit by themselves."""
        self._open_incident(cause, self.now_s, 0.0)
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
        self._record(GenerationEnded(self.now_s, number, self.max_step, "the training script is done"))
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

    # ------------------------------------------------------------------ small parts

    def _candidates(self) -> list[capacity.Candidate]:
        """Nodes that are HEALTHY and not drained, by name; notes when the set changed."""
        found = []
        for node in sorted(self.fleet.nodes.values(), key=lambda one: one.name):
            report = node.report
            if report is None or node.name in self.history.drained or report.devices < 1:
                continue
            if node.connected and self.verdict(node).health is Health.HEALTHY:
                losses = tuple(self.history.losses.get(node.name, ()))
                kind, memory_bytes = report.device_kind, report.device_memory_bytes
                found.append(
                    capacity.Candidate(
                        node.name, report.devices, memory_bytes, kind, node.joined_s, losses, report.warm
                    )
                )
        names = tuple(one.node for one in found)
        if names != self._usable_names:
            self._usable_names, self._quiet_since_s = names, self.now_s
        return found

    def _launches(self) -> list[tuple[Node, LaunchReport | None]]:
        generation = self.history.generation
        assert generation is not None
        for part in generation.assignment:
            self.fleet.expect(part.node, self.now_s)
        return self.fleet.launches(iter(generation.assignment), generation.number)

    def _last_names(self) -> tuple[str, ...]:
        return self.history.generation.assignment.names if self.history.generation else ()

    def _ask_for_plan(self, nodes: tuple[NodeCapacity, ...], *, growing: bool) -> None:
        previous = self.history.generation.plan if self.history.generation else None
        self._requests += 1
        self._planning, self._growing = MakePlan(self._requests, nodes, previous), growing
        self._emit(self._planning)

    def _open_incident(self, cause: str, since_s: float, detect_s: float) -> None:
        number = len(self.history.incidents) + 1
        self._record(IncidentOpened(since_s, number, cause, detect_s))
        self._record(StageBegan(since_s, number, "decide"))

    def _extend(self, cause: str, *, instead: bool = False) -> None:
        incident = self.history.incident
        if incident is not None and cause not in incident.cause:
            self._record(IncidentExtended(self.now_s, incident.number, cause, instead))

    def _stage(self, stage: str, *, once: bool = False) -> None:
        incident = self.history.incident
        if incident is None or (once and incident.marks and incident.marks[-1][1] == stage):
            return
        self._record(StageBegan(self.now_s, incident.number, stage))

    def _record(self, fact: Fact) -> None:
        self.history.apply(fact)
        self._emit(Record(fact))

    def _emit(self, command: Command) -> None:
        self._commands.append(command)

    def _push(self) -> None:
        """Every node may have to hear of the change; later pushes of the same answer replace earlier ones."""
        self._commands = [command for command in self._commands if not isinstance(command, Push)]
        self._emit(Push(tuple(sorted(self.fleet.nodes))))


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"
