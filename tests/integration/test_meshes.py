"""The example under every mesh that fits four devices: the same losses, and any of them continues any other."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from orchestrator import ledger, wire
from orchestrator.checkpoint import store, verify
from orchestrator.core.types import (
    AssignedNode,
    Assignment,
    BatchSplit,
    Entrypoint,
    Generation,
    LaunchOrder,
    Mesh,
    Plan,
    SaveReport,
)

MESHES = [
    Mesh(),
    Mesh(dp_shard=2),
    Mesh(dp_replicate=2),
    Mesh(tp=2),
    Mesh(pp=2),
    Mesh(dp_shard=3),
    Mesh(dp_replicate=3),
    Mesh(pp=3),
    Mesh(dp_shard=4),
    Mesh(dp_replicate=4),
    Mesh(tp=4),
    Mesh(pp=4),
    Mesh(dp_shard=2, tp=2),
    Mesh(dp_replicate=2, dp_shard=2),
    Mesh(dp_replicate=2, tp=2),
    Mesh(pp=2, dp_shard=2),
    Mesh(pp=2, dp_replicate=2),
    Mesh(pp=2, tp=2),
]
"""All of one to four devices whose tp divides the example's four key-value heads."""
SAVED_STEP, STEPS_AFTER = 3, 2
GLOBAL_BATCH = 16  # not a multiple of three
MODEL = [
    "--hidden",
    "32",
    "--heads",
    "4",
    "--kv-heads",
    "4",
    "--ffn-hidden",
    "48",
    "--seq-length",
    "8",
    "--warmup",
    "2",
]
TOLERANCE = 1e-5


class Outcome(NamedTuple):
    exit_codes: list[int]
    messages: list[tuple[int, dict[str, Any]]]
    log: str


class Ranks:
    """The warm process that forks ranks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.integration.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "REGROW_DEVICE": "cpu"},
            cwd=Path(__file__).parents[2],
        )

    def run(self, **launch: Any) -> Outcome:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(launch) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Outcome(answer["exit_codes"], [(rank, message) for rank, message in answer["messages"]], answer["log"])

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    process = Ranks()
    yield process
    process.close()


def split(mesh: Mesh) -> BatchSplit:
    """Uneven over the replicas where it must be, and more micro-batches than one rank's share needs."""
    each, left = divmod(GLOBAL_BATCH, mesh.dp_degree)
    samples = tuple(each + (replica < left) for replica in range(mesh.dp_degree))
    micro_batches = max(2, mesh.pp)
    return BatchSplit(GLOBAL_BATCH, -(-max(samples) // micro_batches), micro_batches, samples)


def stages(mesh: Mesh) -> tuple[int, ...]:
    return {1: (4,), 2: (3, 1), 3: (1, 2, 1), 4: (1, 1, 1, 1)}[mesh.pp]


class Job:
    """Launch orders and ledgers of one job in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "checkpoints"
        self.root.mkdir()
        self._generations = 0

    def order(self, mesh: Mesh, checkpoint: str | None = None, save_every_steps: int | None = None) -> LaunchOrder:
        self._generations += 1
        assignment = Assignment((AssignedNode("node-0", 0, mesh.world_size),))
        plan = Plan(mesh, split(mesh), stage_layers=stages(mesh))
        return LaunchOrder(
            job="meshes",
            generation=Generation(self._generations, plan, assignment),
            entrypoint=Entrypoint("train.py"),
            checkpoint_uri=self.root.as_uri(),
            checkpoint_path=checkpoint,
            save_every_s=None,
            save_every_steps=save_every_steps,
            store=None,
            seed=7,
        )

    def ledger(self, order: LaunchOrder) -> Path:
        return self.folder / f"ledger-{order.generation.number}"

    def launch(self, ranks: Ranks, orders: list[LaunchOrder], steps: int, **more: Any) -> Outcome:
        """Train the orders one after the other in one set of ranks."""
        paths = [self.folder / f"order-{order.generation.number}.json" for order in orders]
        for path, order in zip(paths, orders, strict=True):
            path.write_text(wire.dumps(order))
        outcome = ranks.run(
            orders=[str(path) for path in paths],
            arguments=[["--steps", str(steps), *MODEL]] * len(orders),
            ledgers=[str(self.ledger(order)) for order in orders],
            **more,
        )
        assert not any(outcome.exit_codes), f"{orders[0].generation.plan.mesh}: {outcome.exit_codes}\n{outcome.log}"
        return outcome

    def commit(self, outcome: Outcome, order: LaunchOrder, step: int) -> str:
        reports = [SaveReport(**message["report"]) for _, message in outcome.messages if message["type"] == "save"]
        parts = [report for report in reports if report.step == step]
        size = order.generation.plan.mesh.world_size
        done = store.commit(self.root, generation=order.generation.number, step=step, world_size=size, parts=parts)
        verify.verify(self.root, done.path)
        return done.path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def checkpoints(ranks: Ranks, job: Job) -> dict[Mesh, tuple[str, dict[int, ledger.Record]]]:
    """Every mesh trained from scratch, with the checkpoint of SAVED_STEP and the ledger of all steps."""
    trained = {}
    for mesh in MESHES:
        order = job.order(mesh, save_every_steps=SAVED_STEP)
        outcome = job.launch(ranks, [order], SAVED_STEP + STEPS_AFTER)
        trained[mesh] = (job.commit(outcome, order, SAVED_STEP), ledger.effective(job.ledger(order)))
    return trained


Trained = dict[Mesh, tuple[str, dict[int, ledger.Record]]]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_has_the_losses_and_samples_of_one_device(mesh: Mesh, checkpoints: Trained) -> None:
    _, alone = checkpoints[Mesh()]
    _, records = checkpoints[mesh]
    assert list(records) == list(range(1, SAVED_STEP + STEPS_AFTER + 1))
    assert all(record.loss is not None and len(record.samples) == GLOBAL_BATCH for record in records.values())
    difference = ledger.compare(records, alone)
    assert difference.max_loss_difference < TOLERANCE
    assert difference.samples_lost == difference.samples_repeated == 0
    assert {step: record.samples for step, record in records.items()} == {
        step: record.samples for step, record in alone.items()
    }


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_mesh_continues_the_checkpoint_of_every_mesh(
    mesh: Mesh, ranks: Ranks, job: Job, checkpoints: Trained
) -> None:
    _, alone = checkpoints[Mesh()]
    orders = [job.order(mesh, checkpoint) for checkpoint, _ in checkpoints.values()]
    job.launch(ranks, orders, SAVED_STEP + STEPS_AFTER)
    for source, order in zip(checkpoints, orders, strict=True):
        records = ledger.effective(job.ledger(order))
        expected = {step: record for step, record in alone.items() if step > SAVED_STEP}
        assert {step: record.samples for step, record in records.items()} == {
            step: record.samples for step, record in expected.items()
        }
        difference = ledger.compare(records, expected).max_loss_difference
        assert difference < TOLERANCE, f"{source} -> {mesh}: {difference}"


def losses_differ(first: dict[int, ledger.Record], second: dict[int, ledger.Record]) -> bool:
    return ledger.compare(first, second).max_loss_difference > 100 * TOLERANCE


def test_the_comparison_can_fail(ranks: Ranks, job: Job, checkpoints: Trained) -> None:
    """Without the optimizer's moments and the scheduler's step, or with other weights, the losses do differ."""
    _, alone = checkpoints[Mesh()]
    order = dataclasses.replace(job.order(Mesh()), seed=8)
    job.launch(ranks, [order], 2)
    assert losses_differ(ledger.effective(job.ledger(order)), alone)


def test_a_save_request_to_one_rank_saves_all_of_them_after_the_same_step(ranks: Ranks, job: Job) -> None:
    order = job.order(Mesh(dp_shard=2, tp=2))
    outcome = job.launch(ranks, [order], 12, requests=[(3, 2, False)])
    saved: dict[int, set[int]] = {}
    for rank, message in outcome.messages:
        if message["type"] == "save":
            saved.setdefault(message["report"]["step"], set()).add(rank)
    asked, last = sorted(saved)
    assert 4 <= asked < 12 and last == 12
    assert saved[asked] == saved[last] == {0, 1, 2, 3}
    job.commit(outcome, order, asked)


def test_a_pause_saves_the_step_it_ends_at_and_another_mesh_goes_on_from_it(
    ranks: Ranks, job: Job, checkpoints: Trained
) -> None:
    order = job.order(Mesh(pp=2, dp_shard=2))
    outcome = job.launch(ranks, [order], 1000, requests=[(2, 1, True)])
    paused = {rank: message["step"] for rank, message in outcome.messages if message["type"] == "paused"}
    assert paused.keys() == {0, 1, 2, 3} and len(set(paused.values())) == 1
    step = paused[0]
    last = [message for rank, message in outcome.messages if rank == 0 and message["type"] == "progress"][-1]
    assert last["step"] == last["loss_step"] == step and last["loss"] is not None
    path = job.commit(outcome, order, step)
    resumed = job.order(Mesh(tp=2), path)
    job.launch(ranks, [resumed], step + 1)
    assert list(ledger.effective(job.ledger(resumed))) == [step + 1]


def test_a_checkpoint_of_other_data_is_refused(ranks: Ranks, job: Job, checkpoints: Trained) -> None:
    path, _ = checkpoints[Mesh()]
    order = dataclasses.replace(job.order(Mesh(), path), seed=8)
    with pytest.raises(AssertionError, match="seed of the data was 7 when the checkpoint was made and is 8 now"):
        job.launch(ranks, [order], SAVED_STEP + 1)
