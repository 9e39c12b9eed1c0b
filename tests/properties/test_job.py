"""Whatever happens in whatever order, the job keeps its invariants, and its journal tells the whole story."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.core import events as e
from orchestrator.core import facts as f
from orchestrator.core.history import replay
from orchestrator.core.types import (
    LaunchReport,
    LaunchState,
    NodeReport,
    SaveReport,
    WorkerReport,
    WorkerState,
)
from tests.scenarios.model import Cluster
from tests.scenarios.test_stories import spec

NAMES = [f"node-{i}" for i in range(4)]
names = st.sampled_from(NAMES)
ERRORS = ["signal SIGKILL", "ValueError", "MemoryError"]


class Life(RuleBasedStateMachine):
    """Agents come, go, hang and lie; users drain and stop; controllers restart; answers come late or never."""

    @initialize(minimum=st.integers(1, 2), maximum=st.integers(2, 4))
    def start(self, minimum: int, maximum: int) -> None:
        self.cluster = Cluster(spec(min=str(minimum), max=str(maximum)))
        self.generation = 0
        self.facts_seen = 0

    @property
    def running(self) -> list[str]:
        return [n for n, a in self.cluster.agents.items() if a.launch and a.launch.state is LaunchState.RUNNING]

    @rule(name=names)
    def up(self, name: str) -> None:
        if name not in self.cluster.agents:
            self.cluster.up(name)

    @rule(gone=st.sets(names, min_size=1, max_size=3))
    def kill(self, gone: set[str]) -> None:
        present = [name for name in sorted(gone) if name in self.cluster.agents]
        if present:
            self.cluster.kill(*present)

    @rule(name=names)
    def restart_agent(self, name: str) -> None:
        if name in self.cluster.agents:
            self.cluster.restart_agent(name)

    @rule(name=names, silent=st.booleans())
    def silence(self, name: str, silent: bool) -> None:
        if name in self.cluster.agents:
            self.cluster.agents[name].silent = silent

    @precondition(lambda self: self.running)
    @rule(data=st.data(), kind=st.sampled_from(ERRORS))
    def fail(self, data: st.DataObject, kind: str) -> None:
        self.cluster.fail(data.draw(st.sampled_from(self.running)), kind)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def stop_worker(self, data: st.DataObject) -> None:
        self.cluster.agents[data.draw(st.sampled_from(self.running))].stopped_worker = True

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 8.0]))
    def run(self, seconds: float) -> None:
        self.cluster.run(seconds)

    @rule()
    def restart_controller(self) -> None:
        self.cluster.restart_controller()

    @rule(name=names, drained=st.booleans())
    def drain(self, name: str, drained: bool) -> None:
        self.cluster.handle(e.DrainOrdered(self.cluster.now_s, name, drained))

    @rule(works=st.booleans())
    def planner(self, works: bool) -> None:
        self.cluster.plans = works

    @rule(works=st.booleans())
    def commits(self, works: bool) -> None:
        self.cluster.commits = works

    @rule(step=st.sampled_from([10, 20, 30]))
    def corrupt(self, step: int) -> None:
        self.cluster.corrupt.add(step)

    @rule(
        name=names,
        generation=st.integers(0, 8),
        state=st.sampled_from(LaunchState),
        worker=st.sampled_from(WorkerState),
        rank=st.integers(0, 5),
        step=st.integers(0, 60),
    )
    def lie(self, name: str, generation: int, state: LaunchState, worker: WorkerState, rank: int, step: int) -> None:
        """A report that fits nothing: from an older or newer generation, of a rank that is not its own."""
        save = SaveReport(generation, step, rank, "part", "", 1, 0.0, 0.0)
        launch = LaunchReport(generation, state, None, (WorkerReport(rank, 1, worker, step=step),), (save,))
        report = NodeReport(name, f"{name}#stranger", "127.0.0.1", 1, launch=launch)
        self.cluster.handle(e.NodeReported(self.cluster.now_s, report))

    @rule(request=st.integers(0, 30), step=st.integers(0, 60), kind=st.integers(0, 4))
    def stale_answer(self, request: int, step: int, kind: int) -> None:
        """An answer to a question that nobody asks any more (or has not asked yet)."""
        job, now_s = self.cluster.job, self.cluster.now_s
        asked = job._planning
        if asked is not None and asked.request == request:
            return
        event = [
            e.PlanImpossible(now_s, request, "no"),
            e.CheckpointPrepared(now_s, request + 1000, step),
            e.CheckpointUnusable(now_s, request + 1000, step, "no"),
            e.CommitFailed(now_s, request, step, "no"),
            e.NodeDisconnected(now_s, "node-0", "unknown"),
        ][kind]
        self.cluster.handle(event)

    @invariant()
    def generation_only_grows(self) -> None:
        starts = [x.generation.number for x in self.cluster.journal if isinstance(x, f.GenerationStarted)]
        assert starts == sorted(set(starts))

    @invariant()
    def at_most_one_generation_is_live(self) -> None:
        live = 0
        for fact in self.cluster.journal:
            if isinstance(fact, f.GenerationStarted):
                live += 1
            elif isinstance(fact, f.GenerationEnded):
                live -= 1
            assert live in {0, 1}
        launches = [self.cluster.job.directive(name).launch for name in NAMES]
        assert len({launch.generation.number for launch in launches if launch is not None}) <= 1

    @invariant()
    def no_two_nodes_hold_one_rank(self) -> None:
        generation = self.cluster.history.generation
        if generation is None:
            return
        nodes = [part.node for part in generation.assignment]
        ranks = [
            rank for part in generation.assignment for rank in range(part.first_rank, part.first_rank + part.devices)
        ]
        assert len(nodes) == len(set(nodes))
        assert sorted(ranks) == list(range(generation.plan.mesh.world_size))

    @invariant()
    def committed_step_never_decreases(self) -> None:
        newest, rejected = -1, set()
        for fact in self.cluster.journal:
            if isinstance(fact, f.CheckpointRejected):
                rejected.add(fact.path)
                kept = [
                    x for x in self.cluster.journal if isinstance(x, f.CheckpointRecorded) and x.path not in rejected
                ]
                newest = max([x.step for x in kept if x.time_s <= fact.time_s], default=-1)
            elif isinstance(fact, f.CheckpointRecorded):
                assert fact.step > newest
                newest = fact.step

    @invariant()
    def a_generation_restores_the_newest_checkpoint(self) -> None:
        history = self.cluster.history
        if history.live and history.generation and history.ran_s is None:
            rejected = set(history.rejected)
            started = next(x for x in reversed(self.cluster.journal) if isinstance(x, f.GenerationStarted))
            before = self.cluster.journal[: self.cluster.journal.index(started)]
            good = [x.path for x in before if isinstance(x, f.CheckpointRecorded) and x.path not in rejected]
            assert history.generation.checkpoint_path == (good[-1] if good else None)

    @invariant()
    def replay_gives_the_same_state(self) -> None:
        assert replay(self.cluster.journal) == self.cluster.history

    @invariant()
    def an_ended_job_stays_ended(self) -> None:
        ends = [i for i, fact in enumerate(self.cluster.journal) if isinstance(fact, f.JobEnded)]
        if ends:
            after = self.cluster.journal[ends[0] + 1 :]
            assert all(isinstance(fact, f.NodeReturned | f.NodeDrained | f.CheckpointRecorded) for fact in after)


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
