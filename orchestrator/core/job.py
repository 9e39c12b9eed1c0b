"""The state machine: `Job.handle(event) -> commands`. No clock, no I/O; same events, same commands.

    WAITING -> (plan) -> CONVERTING -> (generation) -> STARTING -> RUNNING -> STOPPING -> WAITING ...

Level-based: every event updates what is observed, then `_advance` compares what is with what should be and takes at
most a few transitions. What must survive a restart becomes a fact (`Record`); `history` is the fold of those facts.
"""

from __future__ import annotations

from orchestrator.core import capacity, interval, policy, rates
from orchestrator.core.commands import (
    Command,
    FenceCheckpoints,
    PrepareCheckpoint,
    PruneCheckpoints,
)
from orchestrator.core.decision import Decision, Option, after_loss
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointPrepared,
    CheckpointUnusable,
    CommitFailed,
    DrainOrdered,
    Event,
    HeartbeatsArrived,
    NodeDisconnected,
    NodeReported,
    NodesReported,
    PlanImpossible,
    PlanMade,
    SaveOrdered,
    StopOrdered,
    StoreTaken,
    Tick,
)
from orchestrator.core.facts import (
    CheckpointRecorded,
    CheckpointRejected,
    GenerationStarted,
    NodeDrained,
    NodeReturned,
    StopRequested,
)
from orchestrator.core.fleet import StepClock
from orchestrator.core.live import LiveJob
from orchestrator.core.status import Phase
from orchestrator.core.types import (
    Assignment,
    Generation,
    LaunchState,
    NodeCapacity,
    NodeReport,
    Plan,
)

FIRST_SETTLE = 5
"""The very first plan waits this many settle windows for `max_nodes` to register, later ones do not."""


class Job(LiveJob):
    """Takes in events; WAITING and CONVERTING, and the moves between all phases."""

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
            case NodesReported():
                matters = [self._observe_report(report) for report in event.reports]
                return any(matters)
            case HeartbeatsArrived():
                self.fleet.hear(event.silent, self.now_s)
                return False
            case NodeDisconnected():
                self.fleet.disconnect(event.node, event.instance, self.now_s)
            case PlanMade() | PlanImpossible():
                self._observe_plan(event)
            case CheckpointPrepared() | CheckpointUnusable():
                self._observe_prepared(event)
            case CheckpointCommitted() | CommitFailed():
                self._observe_commit(event)
            case StoreTaken():
                if not self.history.ended:
                    self._finish(Phase.FAILED, event.reason)
            case DrainOrdered():
                if (event.node in self.history.drained) != event.drained:
                    self._record(NodeDrained(self.now_s, event.node, event.drained))
            case SaveOrdered():
                self.save_request += 1
                self._push()
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
            node = self.fleet.nodes[report.node]
            node.joined_s, node.candidate = self.now_s, None
        launch = report.launch
        if not history.generation or launch is None or launch.generation != history.number:
            return True
        self.saves.add(launch.saves, history.newest_step)
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
            self._chosen, self._planned_for = (event.plan, event.assignment), request.nodes

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
        if isinstance(event, CheckpointCommitted) and event.cost_s is not None:
            self._save_costs = [*self._save_costs, event.cost_s][-interval.REMEMBERED :]
        if isinstance(event, CheckpointCommitted) and event.step > history.newest_step:
            self._record(
                CheckpointRecorded(self.now_s, event.generation, event.step, event.path, event.size_bytes),
            )
            kept = [one.path for one in history.checkpoints]
            if history.generation is not None and history.generation.checkpoint_path is not None:
                kept.append(history.generation.checkpoint_path)
            self._emit(PruneCheckpoints(history.spec.checkpoint.keep_last, tuple(kept), history.number))
            self._push()
            self._consider_interval()

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
        history = self.history
        if self.saves.committing:
            self.reason = f"committing step {max(self.saves.committing)}"
            return
        if history.stop_requested:
            self._finish(Phase.FAILED, f"stopped by order; the newest checkpoint is of step {history.committed_step}")
            return
        nodes = self.usable()
        if self._patient and nodes != self._planned_for:
            self._patient, self._chosen = False, None  # somebody came or went meanwhile: plan anew
        if self._chosen is not None:
            waiting = self._worth_waiting(*self._chosen)
            self._patient = waiting is not None
            if waiting is not None:
                self.reason = waiting
            else:
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

    def usable(self) -> tuple[NodeCapacity, ...]:
        """The nodes that a plan made now would be made for."""
        return capacity.choose(self._candidates(), self.history.spec, self.now_s, self._last_names())

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
        if patience_s is not None and len(nodes) < before and losses and self.now_s - max(losses) < patience_s:
            return f"waiting up to {patience_s:g} s for a replacement: {len(nodes)} of {before} nodes are left"
        return None

    def _worth_waiting(self, plan: Plan, assignment: Assignment) -> str | None:
        """Why the plan for what is left is not taken yet: the lost nodes are expected back soon enough."""
        history, last = self.history, self.history.generation
        if last is None or history.spec.recovery.wait_for_replacement_s is not None:
            return None
        away = [name for name in last.assignment.names if name in history.lost and name not in history.drained]
        if not away:
            return None
        horizon_s = rates.mtbf_s(history, len(assignment.nodes), self.now_s)
        if plan.mesh.world_size >= last.plan.mesh.world_size:
            joining = sorted(set(assignment.names) - set(last.assignment.names))
            replaced = f"{', '.join(joining)} for {', '.join(away)}" if joining else "all devices are used again"
            self._decide(Decision(Option("use spare", horizon_s, replaced), (), horizon_s))
            return None
        wait_s = rates.return_s(history, away, self.now_s)
        decision = after_loss(last.plan, plan, wait_s=wait_s, switch_s=policy.switch_s(history), horizon_s=horizon_s)
        self._decide(decision)
        return f"waiting for {', '.join(away)}: {decision.reason}" if decision.chosen.name == "wait" else None

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
        checkpoint = self.history.checkpoint
        step, path = (checkpoint.step, checkpoint.path) if checkpoint else (None, None)
        generation = Generation(number, plan, assignment, step, path)
        self._record(GenerationStarted(self.now_s, generation))
        self._emit(FenceCheckpoints(number))
        self.saves.begin(number)
        self._assigned = frozenset(assignment.names)
        self.clock = StepClock()
        self.max_step = generation.checkpoint_step or 0
        self.save_request = 0
        self._declined = None
        for part in assignment:
            self.fleet.nodes[part.node].restarted = False
        self._stage("launch")
        self._push()
        self.reason = f"launching {plan.mesh} on {_nodes(len(assignment.nodes))}: {plan.reason}"

    def _last_names(self) -> tuple[str, ...]:
        return self.history.generation.assignment.names if self.history.generation else ()


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"
