"""What a job knows, and the only ways in which it changes: facts are recorded here, commands collected here."""

from __future__ import annotations

from orchestrator.core import capacity, interval, rates
from orchestrator.core.commands import (
    Command,
    CommitCheckpoint,
    MakePlan,
    PrepareCheckpoint,
    Push,
    Record,
)
from orchestrator.core.decision import Decision
from orchestrator.core.facts import (
    DecisionTaken,
    Fact,
    IncidentExtended,
    IncidentOpened,
    NodeLost,
    StageBegan,
)
from orchestrator.core.fleet import Fleet, Node, StepClock
from orchestrator.core.health import SILENT_HEARTBEATS, Signals, verdict
from orchestrator.core.history import History
from orchestrator.core.saves import Saves
from orchestrator.core.status import Health, Phase, Verdict
from orchestrator.core.types import (
    Assignment,
    Directive,
    LaunchOrder,
    LaunchReport,
    LaunchState,
    MeasuredPlan,
    NodeCapacity,
    NodeReport,
    Plan,
)


class JobState:
    """One job: durable `history`, observed `fleet`, and the requests that are under way."""

    def __init__(self, history: History, now_s: float) -> None:
        self.history = history
        self.fleet = Fleet()
        self.saves = Saves(generation=history.number)
        self.clock = StepClock()
        self.now_s = self.opened_s = now_s
        self.reason = "the controller has just started"
        self.max_step = max(0, history.newest_step)
        """Highest step that the newest generation was seen to reach."""
        self.save_request = 0
        """Number of the last save that a user ordered in this generation; forgotten when the controller restarts."""
        self.loss: tuple[int, float] | None = None
        """Newest (step, loss)."""
        self.save_every = interval.first(history.spec.checkpoint.auto) if history.spec.checkpoint.auto else None
        """How often to save, where the job file leaves it open."""
        self._assigned: frozenset[str] = (
            frozenset(history.generation.assignment.names) if history.generation else frozenset()
        )
        """Nodes of the newest generation, as a set."""
        self._failed: frozenset[str] = frozenset()
        """Nodes of the live generation whose workers have failed."""
        self._save_costs: list[tuple[float, float]] = []
        """(Stall, write) seconds of the last saves of this controller's time."""
        recovery = history.spec.recovery
        self._quiet_s = min(SILENT_HEARTBEATS * recovery.heartbeat_s, recovery.lost_after_s)
        """Silence of a node that nothing is thought of."""
        self._commands: list[Command] = []
        self._requests = 0
        self._planning: MakePlan | None = None
        self._growing = False
        self._no_plan: tuple[tuple[NodeCapacity, ...], str] | None = None
        self._declined: tuple[tuple[NodeCapacity, ...], str] | None = None
        self._chosen: tuple[Plan, Assignment] | None = None
        self._planned_for: tuple[NodeCapacity, ...] = ()
        """The nodes that the chosen plan was asked for."""
        self._patient = False
        """True while a chosen plan waits for lost nodes to return."""
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
            save_request=self.save_request,
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
        return LaunchOrder(
            job=spec.name,
            generation=history.generation,
            entrypoint=spec.entrypoint,
            checkpoint_uri=spec.checkpoint.uri,
            checkpoint_path=history.generation.checkpoint_path,
            save_every_s=self.save_every.seconds if self.save_every else spec.checkpoint.every_s,
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

    # ------------------------------------------------------------------ verdicts and saves

    def _judge_nodes(self) -> None:
        self._failed = self._failed_nodes()
        for node in self.fleet.nodes.values():
            if self._plainly_healthy(node):
                continue
            judged = self.verdict(node)
            if judged.health is Health.LOST and node.name not in self.history.lost:
                if node.report is None and node.name not in self._assigned:
                    continue
                self._record(NodeLost(self.now_s, node.name, judged.reason))
                node.candidate = None

    def _plainly_healthy(self, node: Node) -> bool:
        """What nearly all nodes are, at a glance: `verdict` says HEALTHY of these, too."""
        return (
            node.connected is True and self.now_s - node.heard_s < self._quiet_s and node.name not in self.history.lost
        )

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
            self._save_costs = [*self._save_costs, interval.cost(parts)][-interval.REMEMBERED :]
            self._emit(CommitCheckpoint(history.number, step, history.generation.plan.mesh.world_size, parts))

    def _consider_interval(self) -> None:
        """What saves cost and how often the job fails say how often to save, where the job file leaves that open."""
        auto, generation = self.history.spec.checkpoint.auto, self.history.generation
        if auto is None or self.save_every is None or generation is None or not self._save_costs:
            return
        stall_s, write_s = interval.typical(self._save_costs)
        tier = interval.Tier(stall_s, write_s, rates.mtbf_s(self.history, len(generation.assignment.nodes), self.now_s))
        wanted = interval.save_every(tier, auto.least_s, auto.most_s)
        if not 1 / interval.CHANGE < wanted.seconds / self.save_every.seconds < interval.CHANGE:
            self.save_every = wanted
            self._push()

    # ------------------------------------------------------------------ small parts

    def _candidates(self) -> list[capacity.Candidate]:
        """Nodes that are HEALTHY and not drained, by name; notes when the set changed."""
        found, drained = [], self.history.drained
        for node in self.fleet.in_order():
            if node.report is None or node.report.devices < 1 or (drained and node.name in drained):
                continue
            if self._plainly_healthy(node) or (node.connected and self.verdict(node).health is Health.HEALTHY):
                found.append(node.candidate or self._candidate(node, node.report))
        names = tuple(one.node for one in found)
        if names != self._usable_names:
            self._usable_names, self._quiet_since_s = names, self.now_s
        return found

    def _candidate(self, node: Node, report: NodeReport) -> capacity.Candidate:
        """Kept with the node until it says something else of itself, is lost, or returns."""
        losses = tuple(self.history.losses.get(node.name, ()))
        offer = capacity.offer(report, self.history.spec)
        node.candidate = capacity.Candidate(node.name, offer, node.joined_s, losses, report.warm)
        return node.candidate

    def _launches(self) -> list[tuple[Node, LaunchReport | None]]:
        generation = self.history.generation
        assert generation is not None
        for part in generation.assignment:
            self.fleet.expect(part.node, self.now_s)
        return self.fleet.launches(iter(generation.assignment), generation.number)

    def _open_incident(self, cause: str, since_s: float, detect_s: float) -> None:
        number = len(self.history.incidents) + 1
        self._record(IncidentOpened(since_s, number, cause, detect_s))
        self._record(StageBegan(since_s, number, "decide"))

    def _decide(self, decision: Decision) -> None:
        """Note in the incident what was weighed, when another option is the best than before."""
        incident = self.history.incident
        if incident is not None and not incident.decision.startswith(decision.chosen.name):
            self._record(DecisionTaken(self.now_s, incident.number, decision.chosen.name, decision.reason))

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

    def _kind(self) -> str:
        """Of the devices of the newest generation; empty where there are several."""
        reports = [self.fleet.nodes[name].report for name in sorted(self._assigned) if name in self.fleet.nodes]
        kinds = {self.history.spec.device_kind or report.device_kind for report in reports if report is not None}
        return kinds.pop() if len(kinds) == 1 else ""

    def _measured(self) -> tuple[MeasuredPlan, ...]:
        """The step of the live generation, as far as it is known."""
        last, step_s, kind = self.history.generation, self.clock.median_s, self._kind()
        if not (last and self.history.live and step_s and kind):
            return ()
        return (MeasuredPlan(last.plan, last.assignment, kind, step_s),)

    def _ask_for_plan(self, nodes: tuple[NodeCapacity, ...], *, growing: bool) -> None:
        last = self.history.generation
        plan, assignment = (last.plan, last.assignment) if last else (None, None)
        self._requests += 1
        measured = (*self.history.measured, *self._measured())
        self._planning, self._growing = MakePlan(self._requests, nodes, plan, assignment, measured), growing
        self._emit(self._planning)
