"""The virtual-time host of `core.job`: what the controller, agents and workers do, as far as time is concerned.

Between two things that matter nothing is done: heartbeats in between are told by one `HeartbeatsArrived`, saves of an
uninterrupted stretch are counted when it ends and only the last of them is told to the job.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.core.capacity import held_s
from orchestrator.core.commands import Command, MakePlan, PrepareCheckpoint
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointPrepared,
    DrainOrdered,
    Event,
    HeartbeatsArrived,
    NodeDisconnected,
    NodesReported,
    PlanImpossible,
    PlanMade,
    Tick,
)
from orchestrator.core.facts import JobAccepted
from orchestrator.core.history import replay
from orchestrator.core.job import Job
from orchestrator.core.spec import JobSpec
from orchestrator.core.status import Phase
from orchestrator.core.types import (
    Generation,
    LaunchReport,
    LaunchState,
    NodeCapacity,
    NodeReport,
    WorkerError,
    WorkerReport,
    WorkerState,
)
from orchestrator.planner import Infeasible, Planned
from orchestrator.simulation.account import Account, Stretch
from orchestrator.simulation.failures import Kind, Outage
from orchestrator.simulation.policies import Planner, Policy
from orchestrator.simulation.timing import Timing

LOOK_S, MOST_LOOK_S = 60.0, 1800.0
"""While the job waits it is asked again after so long, each time longer."""
LEAST_STEP_S = 1e-3


@dataclass(slots=True)
class _Node:
    """One simulated node."""

    capacity: NodeCapacity
    up: bool = True
    starts: int = 1
    """Of its agent."""

    def report(self, launch: LaunchReport | None) -> NodeReport:
        """Its heartbeat."""
        one = self.capacity
        return NodeReport(
            one.node,
            f"{one.node}#{self.starts}",
            "",
            one.devices,
            one.kind,
            one.memory_bytes,
            launch=launch,
            rack=one.rack,
        )


@dataclass(frozen=True, slots=True)
class _Training:
    """A stretch of training that goes on."""

    generation: Generation
    since_s: float
    every_s: float


class World:
    """One job under one policy, with what happens to its nodes."""

    def __init__(
        self,
        job: JobSpec,
        nodes: Sequence[NodeCapacity],
        outages: Sequence[Outage],
        policy: Policy,
        timing: Timing,
        seconds: float,
    ) -> None:
        self.spec = policy.spec(job, nodes)
        self.account = Account()
        self.job = Job(replay([JobAccepted(0.0, self.spec, 0)]), 0.0)
        self._timing, self._seconds = timing, seconds
        self._nodes = [_Node(one) for one in nodes]
        self._index = {one.node: number for number, one in enumerate(nodes)}
        self._planner = Planner(self.spec, policy)
        self._full_s, self._most_s = self._reference(job, nodes)
        self._now_s, self._order = 0.0, 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._cause, self._cause_since_s = "restart", 0.0
        self._training: _Training | None = None
        self._requests = 0
        self._launching = self._pausing = 0
        self._saved = False
        self._look_s = LOOK_S
        self._looks = 0
        self._drained: set[int] = set()
        for one in outages:
            self._at(max(0.0, one.start_s - one.notice_s), lambda one=one: self._strike(one))  # type: ignore[misc]

    def run(self) -> Account:
        """Live through it; the account's seconds add up to the time simulated."""
        self._tell(NodesReported(0.0, tuple(node.report(None) for node in self._nodes)))
        self._at(self.spec.recovery.settle_s * 6, self._tick)
        while self._queue and self._queue[0][0] < self._seconds:
            self._now_s, _, act = heapq.heappop(self._queue)
            act()
        self._now_s = self._seconds
        self._leave_training(graceful=True) if self._training else self._spent("")
        return self.account

    # ------------------------------------------------------------ speeds

    def _reference(self, job: JobSpec, nodes: Sequence[NodeCapacity]) -> tuple[float, float]:
        """Seconds of a step on all nodes, and on as many as the policy uses."""
        on_all = Planner(job, Policy("all", "")).plan(nodes, None, None)
        used = self._planner.plan(nodes[: self.spec.max_nodes], None, None)
        if isinstance(on_all, Infeasible) or isinstance(used, Infeasible):
            reason = on_all.reason if isinstance(on_all, Infeasible) else used.reason  # type: ignore[union-attr]
            raise ValueError(reason)
        self._planner.first = used.plan
        return _step_s(on_all), _step_s(used)

    def _speed(self, generation: Generation) -> tuple[float, float]:
        """(Of all nodes' full speed, what is missing because nodes are held back)."""
        held_back = max(0.0, 1 - self._full_s / self._most_s)
        speed = min(1 - held_back, self._full_s / _of(generation))
        return speed, held_back

    # ------------------------------------------------------------ time

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (max(time_s, self._now_s), self._order, act))

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._at(self._now_s + seconds, act)

    def _spent(self, next_cause: str) -> None:
        """What the time since the last change went to; from now on it goes to `next_cause`."""
        if self._training is None:
            self.account.spend(self._cause, self._now_s - self._cause_since_s)
        self._cause, self._cause_since_s = next_cause, self._now_s

    def _tick(self) -> None:
        self._tell(Tick(self._now_s))

    # ------------------------------------------------------------ the job

    def _tell(self, event: Event) -> None:
        """Have the job take in an event, all heartbeats up to now first; carry out what it wants."""
        self._hear()
        for command in self.job.handle(event):
            self._carry_out(command)
        self._follow()

    def _hear(self) -> None:
        """All heartbeats up to now have arrived."""
        silent = frozenset(node.capacity.node for node in self._nodes if not node.up)
        self.job.handle(HeartbeatsArrived(self._now_s, silent))

    def _carry_out(self, command: Command) -> None:
        match command:
            case MakePlan():
                self._requests += 1
                self._after(self._timing.plan_s, lambda: self._planned(command))
            case PrepareCheckpoint():
                answer = CheckpointPrepared(0.0, command.request, command.step)
                self._after(self._timing.convert_s, lambda: self._tell(_now(answer, self._now_s)))
            case _:
                pass

    def _planned(self, command: MakePlan) -> None:
        self._requests -= 1
        found = self._planner.plan(command.nodes, command.previous, command.assignment)
        if isinstance(found, Infeasible):
            self._tell(PlanImpossible(self._now_s, command.request, found.reason))
        else:
            self._tell(PlanMade(self._now_s, command.request, found.plan, found.assignment))

    def _follow(self) -> None:
        """Do what workers do in the phase that the job is in now, and note what the time goes to."""
        job, number = self.job, self.job.history.number
        phase = job.phase
        if phase is Phase.STARTING and self._launching != number:
            self._launching = number
            assert job.history.generation is not None
            devices = job.history.generation.plan.mesh.world_size
            self._after(self._timing.restart_s(devices), lambda: self._ran(number))
        if phase is Phase.STOPPING and self._pausing != number:
            stopping = job.history.stopping
            if stopping is not None and stopping.planned:
                self._pausing = number
                self.account.changes += 1
                self._after(self._timing.stall_s, lambda: self._save_and_pause(number))
            else:
                self._after(1.0, lambda: self._report_all(number, LaunchState.STOPPED))
        if self._training is None:
            self._spent(self._phase_cause(phase))
        if phase is Phase.WAITING and not self._requests and self.spec.recovery.wait_for_replacement_s is None:
            self._look_later()
        elif phase is not Phase.WAITING:
            self._look_s = LOOK_S

    def _phase_cause(self, phase: Phase) -> str:
        if self._cause == "detection":
            return "detection"  # until the failure is told
        if phase is Phase.WAITING:
            return "decision" if self._requests else "waiting"
        return {Phase.CONVERTING: "conversion", Phase.STARTING: "restart", Phase.STOPPING: "decision"}.get(
            phase, "waiting"
        )

    def _look_later(self) -> None:
        self._looks += 1
        mine = self._looks
        self._after(self._look_s, lambda: self._tick() if mine == self._looks else None)
        self._look_s = min(MOST_LOOK_S, 1.5 * self._look_s)

    # ------------------------------------------------------------ workers

    def _ran(self, number: int) -> None:
        """The first step of a generation is done."""
        job, generation = self.job, self.job.history.generation
        if job.phase is not Phase.STARTING or job.history.number != number or generation is None:
            return
        if not all(self._nodes[self._index[name]].up for name in generation.assignment.names):
            return  # the failure is about to be told
        self._spent("")
        self._train(generation)
        self._tell(NodesReported(self._now_s, self._reports(LaunchState.RUNNING, step=_first(generation) + 1)))

    def _train(self, generation: Generation) -> None:
        """A stretch of training begins; the very first save shows what saving costs, and so how often to."""
        auto = self.job.save_every
        every_s = auto.seconds if auto else self.spec.checkpoint.every_s or self._seconds
        self._training = _Training(generation, self._now_s, max(every_s, self._timing.stall_s))
        if auto and not self._saved:
            number = generation.number
            self._after(every_s + self._timing.stall_s + self._timing.write_s, lambda: self._measured(number))

    def _measured(self, number: int) -> None:
        """The first save is committed. What was trained since counts as kept: a minute, once."""
        if self._training is not None and self._training.generation.number == number and not self._saved:
            generation = self._training.generation
            self._leave_training(graceful=True)
            self._train(generation)

    def _reports(
        self, state: LaunchState, step: int = 0, error: WorkerError | None = None, broken: int | None = None
    ) -> tuple[NodeReport, ...]:
        """What the nodes of the generation that are up say of it; rank 0's alone names a worker."""
        generation = self.job.history.generation
        assert generation is not None
        worker = WorkerReport(0, 1, WorkerState.RUNNING, step=step)
        alive = state is LaunchState.RUNNING
        first = LaunchReport(generation.number, state, "virtual:1", (worker,) if alive else ())
        others = LaunchReport(generation.number, state)
        at_fault = LaunchReport(generation.number, state, errors=(error,) if error else ())
        found = []
        for place, name in enumerate(generation.assignment.names):
            node = self._nodes[self._index[name]]
            if node.up:
                said = at_fault if self._index[name] == broken else first if place == 0 else others
                found.append(node.report(said))
        return tuple(found)

    def _report_all(self, number: int, state: LaunchState) -> None:
        if self.job.history.number == number and self.job.phase is Phase.STOPPING:
            self._tell(NodesReported(self._now_s, self._reports(state)))

    def _leave_training(self, *, graceful: bool) -> None:
        """The stretch is over: book it, and tell the job of the last save that was committed."""
        training = self._training
        assert training is not None
        self._hear()
        self._training = None
        stretch = Stretch(self._now_s - training.since_s, training.every_s, self._timing.stall_s, self._timing.write_s)
        self.account.train(stretch, *self._speed(training.generation), graceful=graceful)
        kept_s = stretch.trained_s if graceful else stretch.kept_s
        step = _first(training.generation) + int(kept_s / _of(training.generation))
        if step > self.job.history.newest_step:
            self._saved = True
            cost_s = self._timing.stall_s, self._timing.write_s
            self.job.handle(
                CheckpointCommitted(self._now_s, training.generation.number, step, f"step-{step}", 0, cost_s)
            )
        self._cause, self._cause_since_s = "", self._now_s

    def _save_and_pause(self, number: int) -> None:
        """Workers have saved before a planned change, and exit when that is written."""
        if self._training is None or self.job.history.number != number:
            return
        self._leave_training(graceful=True)
        self._cause = "checkpoint stall"
        self._after(self._timing.write_s, lambda: self._report_all(number, LaunchState.PAUSED))

    # ------------------------------------------------------------ what happens to nodes

    def _strike(self, outage: Outage) -> None:
        self._hear()
        if outage.notice_s:
            self._announce(outage)
        elif outage.kind is Kind.PROCESS:
            self._break(outage, self._timing.hang_s if outage.silent else self._timing.detect_s)
        else:
            self._fall(outage)

    def _announce(self, outage: Outage) -> None:
        for node in outage.nodes:
            self._drained.add(node)
            self._tell(DrainOrdered(self._now_s, self._nodes[node].capacity.node, drained=True))
        self._at(outage.start_s, lambda: self._fall(outage))

    def _fall(self, outage: Outage) -> None:
        """Nodes go; the job learns of it when that shows."""
        self._at(outage.end_s, lambda: self._rise(outage))
        used = self._in_use(outage.nodes)
        late_s = self._timing.hang_s if outage.silent and used else self._timing.detect_s
        for node in outage.nodes:
            self._nodes[node].up = False
        self._break(outage, late_s) if used else self._after(late_s, lambda: self._told(outage, 0))

    def _in_use(self, nodes: Sequence[int]) -> bool:
        history = self.job.history
        if not history.live or history.generation is None:
            return False
        names = {self._nodes[node].capacity.node for node in nodes}
        return any(name in names for name in history.generation.assignment.names)

    def _break(self, outage: Outage, late_s: float) -> None:
        """The live generation has lost a worker."""
        if not self.job.history.live or not self._in_use(outage.nodes):
            return
        if self._training is not None:
            self._leave_training(graceful=False)
            self.account.interruptions += 1
        else:
            self._spent("")
        self._cause = "detection"
        number = self.job.history.number
        self._after(late_s, lambda: self._told(outage, number))

    def _told(self, outage: Outage, number: int) -> None:
        """The failure has shown: connections are closed, and the survivors' collectives broken."""
        self._spent("decision") if self._training is None else None
        gone = [self._nodes[node] for node in outage.nodes if not self._nodes[node].up]
        for node in gone:
            instance = f"{node.capacity.node}#{node.starts}"
            self._tell(NodeDisconnected(self._now_s, node.capacity.node, instance))
        history = self.job.history
        live = number and history.number == number and self.job.phase in (Phase.STARTING, Phase.RUNNING, Phase.STOPPING)
        if live:
            error = None
            if outage.kind is Kind.PROCESS:
                error = WorkerError(0, "signal SIGKILL", "", "", self.job.max_step, self._now_s)
            self._tell(NodesReported(self._now_s, self._reports(LaunchState.FAILED, 0, error, outage.nodes[0])))
        if any(node.capacity.node not in self.job.history.lost for node in gone):
            self._after(self.spec.recovery.lost_after_s + 0.1, self._tick)

    def _rise(self, outage: Outage) -> None:
        """Nodes are back."""
        reports = []
        for number in outage.nodes:
            node = self._nodes[number]
            node.up = True
            node.starts += 1
            reports.append(node.report(None))
            if number in self._drained:
                self._drained.discard(number)
                self._tell(DrainOrdered(self._now_s, node.capacity.node, drained=False))
        self._tell(NodesReported(self._now_s, tuple(reports)))
        settle_s = self.spec.recovery.settle_s
        losses = self.job.history.losses
        holds = {held_s(losses.get(one.node, ()), settle_s, self._now_s) for one in reports}
        for wait_s in sorted({settle_s, *holds}):
            self._after(wait_s + 0.1, self._tick)


def _first(generation: Generation) -> int:
    return generation.checkpoint_step or 0


def _step_s(found: Planned) -> float:
    return max(LEAST_STEP_S, found.plan.step_s)


def _of(generation: Generation) -> float:
    return max(LEAST_STEP_S, generation.plan.step_s)


def _now(answer: CheckpointPrepared, now_s: float) -> CheckpointPrepared:
    return CheckpointPrepared(now_s, answer.request, answer.step)
