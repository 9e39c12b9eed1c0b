"""A model cluster around the real `Job`: agents that obey directives, commands that succeed unless told otherwise.

Time is virtual. Every command and fact is written to `log` in a short form, which is what the golden stories compare.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from orchestrator.core import commands as c
from orchestrator.core import events as e
from orchestrator.core import facts as f
from orchestrator.core.history import History, replay
from orchestrator.core.job import Job
from orchestrator.core.spec import JobSpec
from orchestrator.core.types import (
    AssignedNode,
    Assignment,
    BatchSplit,
    Directive,
    LaunchReport,
    LaunchState,
    Mesh,
    NodeReport,
    Plan,
    SaveReport,
    WorkerError,
    WorkerReport,
    WorkerState,
)

BEAT_S = 0.5
SAVE_EVERY = 10


@dataclass
class ModelAgent:
    """What a node's agent and its one worker do; `step` advances once per beat while the whole group runs."""

    name: str
    starts: int = 1
    highest: int = 0
    launch: LaunchReport | None = None
    order_store: str | None = None
    rank: int = 0
    world: int = 0
    stopped_worker: bool = False
    connected: bool = True
    silent: bool = False
    idle_s: float = 0.0

    def obey(self, directive: Directive) -> None:
        """Level-based, as the real agent."""
        if directive.generation < self.highest:
            return
        self.highest = directive.generation
        order = directive.launch
        running = self.launch is not None and self.launch.state in {LaunchState.STARTING, LaunchState.RUNNING}
        if self.launch is not None and running and (order is None or order.generation.number != self.launch.generation):
            self.launch = replace(self.launch, state=LaunchState.STOPPED, workers=())
            self.stopped_worker = False
        if order is not None and (self.launch is None or self.launch.generation != order.generation.number):
            self._begin(order.generation.number, order)
        if self.launch is not None and order is not None:
            self.order_store = order.store
            if directive.pause and self.launch.state is LaunchState.RUNNING:
                self._save(self.step)
                self.launch = replace(self.launch, state=LaunchState.PAUSED, paused_step=self.step)
            kept = tuple(s for s in self.launch.saves if s.step > (directive.committed_step or -1))
            self.launch = replace(self.launch, saves=kept)

    def _begin(self, number: int, order: object) -> None:
        assert hasattr(order, "generation")
        generation = order.generation
        part = generation.assignment.of(self.name)
        assert part is not None
        self.rank, self.world = part.first_rank, generation.assignment.world_size
        store = "127.0.0.1:1234" if self.rank == 0 else None
        worker = WorkerReport(self.rank, 1000 + self.rank, WorkerState.STARTING, step=generation.checkpoint_step or 0)
        self.launch = LaunchReport(number, LaunchState.STARTING, store, (worker,))
        self.idle_s = 0.0
        self.stopped_worker = False

    @property
    def step(self) -> int:
        return self.launch.workers[0].step if self.launch and self.launch.workers else 0

    def work(self, together: bool) -> None:
        """One beat of the worker: start, restore, then a step per beat if every rank is there."""
        if self.launch is None or self.launch.state not in {LaunchState.STARTING, LaunchState.RUNNING}:
            return
        worker = self.launch.workers[0]
        self.idle_s += BEAT_S
        state, step = worker.state, worker.step
        if self.stopped_worker:
            state = WorkerState.STOPPED
        elif together and (self.order_store or self.rank == 0):
            ladder = [WorkerState.STARTING, WorkerState.RESTORING, WorkerState.READY, WorkerState.RUNNING]
            state = ladder[min(3, ladder.index(state) + 1)]
            if state is WorkerState.RUNNING:
                step, self.idle_s = step + 1, 0.0
        launch_state = LaunchState.RUNNING if state is WorkerState.RUNNING else self.launch.state
        worker = replace(worker, state=state, step=step, idle_s=self.idle_s)
        self.launch = replace(self.launch, state=launch_state, workers=(worker,))
        if state is WorkerState.RUNNING and step % SAVE_EVERY == 0:
            self._save(step)

    def _save(self, step: int) -> None:
        assert self.launch is not None
        save = SaveReport(self.launch.generation, step, self.rank, f"part-{self.rank}", "", 100, 0.01, 0.1)
        self.launch = replace(self.launch, saves=(*self.launch.saves, save))

    def fail(self, error: WorkerError) -> None:
        assert self.launch is not None
        gone = tuple(replace(worker, state=WorkerState.EXITED, exit_code=1) for worker in self.launch.workers)
        self.launch = replace(self.launch, state=LaunchState.FAILED, errors=(error,), workers=gone)
        self.stopped_worker = False

    def report(self) -> NodeReport:
        return NodeReport(self.name, f"{self.name}#{self.starts}", "127.0.0.1", 1, launch=self.launch)


def error(rank: int, exception: str, step: int, time_s: float, *, collective: bool = False) -> WorkerError:
    return WorkerError(
        rank, exception, "boom", f'  File "train.py", line 7\n{exception}: boom', step, time_s, collective
    )


@dataclass
class Cluster:
    """Job + agents + virtual time."""

    spec: JobSpec
    now_s: float = 0.0
    agents: dict[str, ModelAgent] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    journal: list[f.Fact] = field(default_factory=list)
    corrupt: set[int] = field(default_factory=set)
    plans: bool = True
    commits: bool = True
    controller_up: bool = True

    def __post_init__(self) -> None:
        self.journal.append(f.JobAccepted(self.now_s, self.spec))
        self.job = Job(replay(self.journal), self.now_s)
        self.phase = self.job.phase

    # ---- what happens to it

    def up(self, name: str) -> None:
        agent = self.agents.get(name)
        starts = agent.starts + 1 if agent else 1
        self.agents[name] = ModelAgent(name, starts)
        self._deliver(self.agents[name])

    def kill(self, *names: str) -> None:
        """Node loss: connection closed, peers' collectives fail."""
        alive = [a for n, a in self.agents.items() if n not in names and a.launch is not None]
        gone = [self.agents.pop(name) for name in names]
        for agent in gone:
            self.handle(e.NodeDisconnected(self.now_s, agent.name, agent.report().instance))
        if any(a.launch and a.launch.state in {LaunchState.STARTING, LaunchState.RUNNING} for a in gone):
            for agent in alive:
                if agent.launch and agent.launch.state is LaunchState.RUNNING:
                    agent.fail(error(agent.rank, "DistBackendError", agent.step, self.now_s, collective=True))
                    self._deliver(agent)

    def restart_agent(self, name: str) -> None:
        self.kill(name)
        self.agents[name] = ModelAgent(name, 99)
        self._deliver(self.agents[name])

    def fail(self, name: str, exception: str) -> None:
        """The worker of that node fails by itself; its peers' collectives fail after it."""
        culprit = self.agents[name]
        culprit.fail(error(culprit.rank, exception, culprit.step, self.now_s))
        for agent in self.agents.values():
            if agent is not culprit and agent.launch and agent.launch.state is LaunchState.RUNNING:
                agent.fail(error(agent.rank, "DistBackendError", agent.step, self.now_s + 0.01, collective=True))
        for agent in list(self.agents.values()):
            self._deliver(agent)

    def finish(self) -> None:
        for agent in self.agents.values():
            if agent.launch and agent.launch.state is LaunchState.RUNNING:
                agent.launch = replace(agent.launch, state=LaunchState.SUCCEEDED)

    def restart_controller(self) -> None:
        self.job = Job(replay(self.journal), self.now_s)
        self.log.append(f"{self.now_s:6.1f} -- controller restarted in {self.job.phase}")
        self.phase = self.job.phase

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / BEAT_S)):
            self.now_s += BEAT_S
            together = self._together()
            for agent in list(self.agents.values()):
                agent.work(together)
            for agent in list(self.agents.values()):
                if self.controller_up and not agent.silent:
                    self._deliver(agent)
            if self.controller_up:
                self.handle(e.Tick(self.now_s))

    def _together(self) -> bool:
        live = [a for a in self.agents.values() if a.launch and a.launch.state in _ALIVE]
        groups = {a.launch.generation for a in live if a.launch}
        newest = [a for a in live if a.launch and a.launch.generation == max(groups)]
        whole = bool(newest) and len(newest) == newest[0].world and not any(a.stopped_worker for a in newest)
        return whole and all(a.order_store or a.rank == 0 for a in newest)

    # ---- plumbing

    def _deliver(self, agent: ModelAgent) -> None:
        if not self.controller_up:
            return
        self.handle(e.NodeReported(self.now_s, agent.report()))
        agent.obey(self.job.directive(agent.name))

    def handle(self, event: e.Event) -> None:
        answers = []
        for command in self.job.handle(event):
            self._note(command)
            match command:
                case c.Record():
                    self.journal.append(command.fact)
                case c.MakePlan() if self.plans:
                    answers.append(self._plan(command))
                case c.PrepareCheckpoint():
                    bad = command.step in self.corrupt
                    answers.append(
                        e.CheckpointUnusable(self.now_s, command.request, command.step, "bad checksum")
                        if bad
                        else e.CheckpointPrepared(self.now_s, command.request, command.step)
                    )
                case c.CommitCheckpoint() if self.commits:
                    whole = {(part.generation, part.step) for part in command.parts}
                    assert whole == {(command.generation, command.step)}, "parts of another save in a commit"
                    assert [part.rank for part in command.parts] == list(range(command.world_size))
                    assert command.generation == self.history.number, "an older generation commits"
                    path = f"step-{command.step}-gen-{command.generation}"
                    answers.append(e.CheckpointCommitted(self.now_s, command.generation, command.step, path, 100))
                case c.Push():
                    for name in command.nodes:
                        agent = self.agents.get(name)
                        if agent is not None and not agent.silent:
                            agent.obey(self.job.directive(name))
                case _:
                    pass
        if self.job.phase is not self.phase:
            self.phase = self.job.phase
            self.log.append(f"{self.now_s:6.1f} => {self.phase}: {self.job.reason}")
        for answer in answers:
            self.handle(answer)

    def _plan(self, command: c.MakePlan) -> e.Event:
        nodes, first = [], 0
        for node in command.nodes:
            nodes.append(AssignedNode(node.node, first, node.devices))
            first += node.devices
        samples = tuple(self.spec.global_batch // first + (i < self.spec.global_batch % first) for i in range(first))
        plan = Plan(
            Mesh(dp_shard=first), BatchSplit(self.spec.global_batch, max(samples), 1, samples), reason="all devices"
        )
        return e.PlanMade(self.now_s, command.request, plan, Assignment(tuple(nodes)))

    def _note(self, command: c.Command) -> None:
        match command:
            case c.Push():
                return
            case c.Record(fact):
                text = _fact(fact)
            case c.MakePlan():
                text = f"? plan for {' '.join(node.node for node in command.nodes)}"
            case c.PrepareCheckpoint():
                text = f"? prepare step {command.step} for {command.plan.mesh}"
            case c.CommitCheckpoint():
                text = f"? commit step {command.step} of generation {command.generation}, {len(command.parts)} parts"
            case c.FenceCheckpoints():
                text = f"! fence {command.generation}"
            case c.PruneCheckpoints():
                text = f"! prune, keep {command.keep_last}"
        self.log.append(f"{self.now_s:6.1f}    {text}")

    @property
    def history(self) -> History:
        return self.job.history


_ALIVE = {LaunchState.STARTING, LaunchState.RUNNING}


def _fact(fact: f.Fact) -> str:
    name = type(fact).__name__
    match fact:
        case f.GenerationStarted():
            g = fact.generation
            where = " ".join(g.assignment.names)
            return f"{name} {g.number}: {g.plan.mesh} on {where}, from step {g.checkpoint_step}"
        case f.JobEnded():
            trace = f" [{fact.failure.traceback.splitlines()[-1]}]" if fact.failure and fact.failure.traceback else ""
            return f"{name} {fact.phase}: {fact.reason}{trace}"
        case f.JobAccepted():
            return name
        case _:
            fields = [getattr(fact, field) for field in fact.__slots__ if field != "time_s"]
            return f"{name} {' | '.join(str(value) for value in fields)}"
