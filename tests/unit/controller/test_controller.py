"""The shell around the core, with a real journal and a real checkpoint store; only the agents are played by hand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from orchestrator.checkpoint import store
from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.layout import Box, Piece
from orchestrator.controller.controller import Controller
from orchestrator.controller.journal import MemoryJournal
from orchestrator.core.errors import Conflict, InvalidInput, RegrowError
from orchestrator.core.facts import CheckpointRecorded, Fact, GenerationStarted
from orchestrator.core.spec import CheckpointSpec, JobSpec, RecoverySpec
from orchestrator.core.status import Phase
from orchestrator.core.types import (
    Entrypoint,
    LaunchReport,
    LaunchState,
    NodeReport,
    SaveReport,
    WorkerError,
    WorkerReport,
    WorkerState,
)

DEADLINE_S = 30.0


def spec(root: Path, **changes: object) -> JobSpec:
    fields: dict[str, object] = {"min_nodes": 2, "max_nodes": 2, "recovery": RecoverySpec(lost_after_s=60.0)} | changes
    return JobSpec("gpt", Entrypoint("train.py"), CheckpointSpec(root.as_uri()), 8, **fields)  # type: ignore[arg-type]


def node(name: str, launch: LaunchReport | None = None, start: int = 1) -> NodeReport:
    return NodeReport(name, f"{name}#{start}", "127.0.0.1", 1, launch=launch)


def launch(
    rank: int,
    step: int,
    *,
    generation: int = 1,
    state: LaunchState = LaunchState.RUNNING,
    saves: Sequence[SaveReport] = (),
    errors: Sequence[WorkerError] = (),
) -> LaunchReport:
    worker = WorkerReport(rank, 100 + rank, WorkerState.RUNNING, step=step, loss=1.5)
    return LaunchReport(generation, state, f"127.0.0.1:{generation}", (worker,), tuple(saves), tuple(errors))


def save(root: Path, step: int, rank: int, generation: int = 1) -> SaveReport:
    data = bytes([step, rank]) * 2
    piece = Piece("weight", None, "parameter", "F32", (2,), Box((rank,), (1,)), memoryview(data))
    return native.write_part(
        root.as_uri(), generation=generation, step=step, rank=rank, world_size=2, pieces=[piece], state={}, stall_s=0.1
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - conditions of many kinds, none of which has an event
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(controller: Controller) -> AsyncIterator[Controller]:
    task = asyncio.create_task(controller.run())
    try:
        yield controller
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        controller.close()


async def start(controller: Controller, root: Path) -> None:
    """Two nodes register, and a generation trains."""
    await controller.submit(spec(root))
    for name in ("node-0", "node-1"):
        await controller.report(node(name))
    await until(lambda: all(ordered(controller, name) for name in ("node-0", "node-1")))
    for rank in (0, 1):
        await controller.report(node(f"node-{rank}", launch(rank, 1)))
    assert controller.status("gpt").phase is Phase.RUNNING


def ordered(controller: Controller, name: str) -> bool:
    """Whether the node has been told to launch something."""
    told = controller.directive(name)
    return told is not None and told.launch is not None


async def test_from_registration_to_training(tmp_path: Path) -> None:
    async with running(Controller.open(None)) as controller:
        assert controller.jobs() == []
        await start(controller, tmp_path)
        status = controller.status("gpt")
        assert (status.generation, status.step, status.loss) == (1, 1, 1.5)
        order = controller.directive("node-1")
        assert order is not None
        assert order.launch is not None
        assert order.launch.store == "127.0.0.1:1", "the store that node-0 hosts is passed on"


async def test_a_directive_is_published_only_after_its_facts_are_durable(tmp_path: Path) -> None:
    leaks = []

    class Watching(MemoryJournal):
        def append(self, facts: Sequence[Fact]) -> None:
            if any(isinstance(fact, GenerationStarted) for fact in facts):
                leaks.extend(d for name in ("node-0", "node-1") if (d := controller.directive(name)) and d.launch)
                super().append(facts)
                leaks.extend(d for name in ("node-0", "node-1") if (d := controller.directive(name)) and d.launch)
            else:
                super().append(facts)

    controller = Controller(Watching())
    async with running(controller):
        await start(controller, tmp_path)
    assert leaks == []


async def test_a_subscriber_sees_every_change_once(tmp_path: Path) -> None:
    async with running(Controller.open(None)) as controller:
        await controller.submit(spec(tmp_path))
        await controller.report(node("node-0"))
        stream = controller.directives("node-0")
        first = await anext(stream)
        assert first.launch is None
        await controller.report(node("node-1"))
        async with asyncio.timeout(DEADLINE_S):
            second = await anext(stream)
        assert second.launch is not None


async def test_a_save_is_committed_when_every_rank_has_reported(tmp_path: Path) -> None:
    async with running(Controller.open(None)) as controller:
        await start(controller, tmp_path)
        await controller.report(node("node-0", launch(0, 5, saves=[save(tmp_path, 5, 0)])))
        assert store.committed(tmp_path) == []
        await controller.report(node("node-1", launch(1, 5, saves=[save(tmp_path, 5, 1)])))
        await until(lambda: controller.status("gpt").committed_step == 5)
        assert [one.step for one in store.committed(tmp_path)] == [5]
        await until(lambda: (told := controller.directive("node-0")) is not None and told.committed_step == 5)
        metrics = generate_latest(controller.metrics_registry).decode()
        assert 'regrow_committed_step{job="gpt"} 5.0' in metrics
        assert 'regrow_checkpoint_seconds_count{job="gpt",kind="stall"} 2.0' in metrics


async def test_a_restart_takes_up_the_journal_and_trains_on(tmp_path: Path) -> None:
    journal = tmp_path / "journal.db"
    root = tmp_path / "checkpoints"
    async with running(Controller.open(journal)) as controller:
        await start(controller, root)
        before = controller.directive("node-0")
    async with running(Controller.open(journal)) as controller:
        assert controller.status("gpt").phase is Phase.RUNNING
        await controller.report(node("node-0", launch(0, 9)))
        after = controller.directive("node-0")
        assert before is not None
        assert after is not None
        assert after.launch == before.launch
        assert controller.status("gpt").generation == 1


async def test_a_commit_that_a_crash_kept_out_of_the_journal_is_found(tmp_path: Path) -> None:
    journal = tmp_path / "journal.db"
    root = tmp_path / "checkpoints"
    async with running(Controller.open(journal)) as controller:
        await start(controller, root)
    parts = [save(root, 7, rank) for rank in (0, 1)]
    store.commit(root, generation=1, step=7, world_size=2, parts=parts)
    async with running(Controller.open(journal)) as controller:
        assert controller.status("gpt").committed_step == 7
    async with running(Controller.open(journal)) as controller:
        assert controller.status("gpt").committed_step == 7


async def test_checkpoints_of_an_earlier_run_are_taken_up(tmp_path: Path) -> None:
    parts = [save(tmp_path, 7, rank, generation=4) for rank in (0, 1)]
    store.commit(tmp_path, generation=4, step=7, world_size=2, parts=parts)
    async with running(Controller.open(None)) as controller:
        await controller.submit(spec(tmp_path))
        for name in ("node-0", "node-1"):
            await controller.report(node(name))
        await until(lambda: ordered(controller, "node-0"))
        directive = controller.directive("node-0")
        assert directive is not None
        assert directive.launch is not None
        assert directive.launch.generation.number == 5
        assert directive.launch.checkpoint_path == "step-00000007-gen-0004"


async def test_one_job_at_a_time(tmp_path: Path) -> None:
    async with running(Controller.open(None)) as controller:
        await controller.submit(spec(tmp_path))
        with pytest.raises(Conflict, match="gpt is active"):
            await controller.submit(spec(tmp_path))
        await controller.stop("gpt")
        await until(lambda: controller.status("gpt").phase is Phase.FAILED)
        await controller.submit(spec(tmp_path))
        assert controller.status("gpt").phase is Phase.WAITING


async def test_the_next_job_starts_on_the_nodes_that_are_there(tmp_path: Path) -> None:
    async with running(Controller.open(None)) as controller:
        await start(controller, tmp_path / "first")
        for rank in (0, 1):
            await controller.report(node(f"node-{rank}", launch(rank, 5, state=LaunchState.SUCCEEDED)))
        await until(lambda: controller.status("gpt").phase is Phase.SUCCEEDED)
        await controller.submit(spec(tmp_path / "second"))
        await until(lambda: controller.status("gpt").phase is Phase.STARTING)
        assert controller.status("gpt").generation == 2


async def test_what_is_unknown_is_named(tmp_path: Path) -> None:
    async with running(Controller.open(None)) as controller:
        with pytest.raises(InvalidInput, match="no job has been submitted"):
            controller.status("gpt")
        await controller.submit(spec(tmp_path))
        with pytest.raises(InvalidInput, match="the job here is gpt"):
            controller.status("other")
        with pytest.raises(InvalidInput, match="no node is called node-9"):
            await controller.drain("gpt", "node-9")


async def test_a_journal_that_cannot_be_written_ends_the_controller(tmp_path: Path) -> None:
    class Full(MemoryJournal):
        full = False

        def append(self, facts: Sequence[Fact]) -> None:
            if self.full:
                raise OSError("No space left on device")
            super().append(facts)

    journal = Full()
    controller = Controller(journal)
    task = asyncio.create_task(controller.run())
    await controller.submit(spec(tmp_path))
    journal.full = True
    await controller.report(node("node-0"))
    with contextlib.suppress(RegrowError):
        await controller.report(node("node-1"))
    with pytest.raises(RegrowError, match="journal could not be written: No space left"):
        await asyncio.wait_for(task, DEADLINE_S)
    directive = controller.directive("node-1")
    assert directive is None or directive.launch is None


async def test_a_store_that_somebody_else_has_taken_over_ends_the_job(tmp_path: Path) -> None:
    async with running(Controller.open(None)) as controller:
        await start(controller, tmp_path)
        parts = [save(tmp_path, 5, rank) for rank in (0, 1)]
        store.fence(tmp_path, 40)
        for rank in (0, 1):
            await controller.report(node(f"node-{rank}", launch(rank, 5, saves=[parts[rank]])))
        await until(lambda: controller.status("gpt").phase is Phase.FAILED)
        assert "generation 40 of another controller" in controller.status("gpt").reason


async def test_a_recovery_is_measured(tmp_path: Path) -> None:
    journal = MemoryJournal()
    async with running(Controller(journal)) as controller:
        await start(controller, tmp_path)
        for rank in (0, 1):
            await controller.report(node(f"node-{rank}", launch(rank, 5, saves=[save(tmp_path, 5, rank)])))
        await until(lambda: any(isinstance(fact, CheckpointRecorded) for fact in journal.facts))
        killed = WorkerError(1, "signal SIGKILL", "", "", 8, 0.0)
        await controller.report(node("node-1", launch(1, 8, state=LaunchState.FAILED, errors=[killed])))
        await controller.report(node("node-0", launch(0, 8, state=LaunchState.STOPPED)))
        await until(lambda: controller.status("gpt").generation == 2)
        for rank in (0, 1):
            await controller.report(node(f"node-{rank}", launch(rank, 6, generation=2)))
        incident = controller.status("gpt").incidents[0]
        assert incident.closed_s is not None
        assert incident.lost_steps == 3
        assert "SIGKILL" in incident.cause
        metrics = generate_latest(controller.metrics_registry).decode()
        assert 'regrow_recovery_seconds_count{job="gpt",stage="total"} 1.0' in metrics
        assert 'regrow_steps_lost_total{job="gpt"} 3.0' in metrics
        assert 'regrow_failures_total{job="gpt",kind="transient"} 1.0' in metrics
        assert 'regrow_badput_seconds_total{cause="starting",job="gpt"}' in metrics


async def test_plans_for_the_next_losses_are_ready_while_it_runs(tmp_path: Path) -> None:
    async with running(Controller(MemoryJournal())) as controller:
        await controller.submit(spec(tmp_path, min_nodes=2, max_nodes=3))
        for name in ("node-1", "node-2", "node-3"):
            await controller.report(node(name))
        await until(lambda: controller.status("gpt").phase is Phase.STARTING)
        assert controller.status("gpt").ladder == ()
        for rank, name in enumerate(("node-1", "node-2", "node-3")):
            await controller.report(node(name, launch(rank, 1)))
        await until(lambda: controller.status("gpt").phase is Phase.RUNNING)
        await until(lambda: bool(controller.status("gpt").ladder))
        one, two, *more = controller.status("gpt").ladder
        assert one.losses == 1 and one.nodes == 2 and one.plan is not None and one.plan.mesh.world_size == 2
        assert two.losses == 2 and two.plan is None and "the job needs 2" in two.reason
        assert all(rung.plan is None for rung in more)
