"""The example under every mesh that fits four devices: the same losses, and any of them continues any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator import ledger
from orchestrator.checkpoint import verify
from orchestrator.core.types import Mesh
from tests.integration.jobs import GLOBAL_BATCH, Job, Ranks

MESHES = [
    Mesh(),
    Mesh(dp_shard=2),
    Mesh(dp_replicate=2),
    Mesh(tp=2),
    Mesh(pp=2),
    Mesh(dp_shard=3),
    Mesh(pp=3),
    Mesh(dp_shard=4),
    Mesh(dp_shard=2, tp=2),
    Mesh(dp_replicate=2, dp_shard=2),
    Mesh(dp_replicate=2, tp=2),
    Mesh(pp=2, dp_shard=2),
    Mesh(pp=2, dp_replicate=2),
    Mesh(pp=2, tp=2),
]
"""Up to four devices: every pair of axes of size two, data parallel three and four ways, three pipeline stages."""
SAVED_STEP, LAST_STEP = 3, 4
TOLERANCE = 1e-5


class Trained(NamedTuple):
    """A mesh trained from scratch to LAST_STEP: its checkpoints and its ledger."""

    saved: str
    last: str
    records: dict[int, ledger.Record]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    process = Ranks()
    yield process
    process.close()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def trained(ranks: Ranks, job: Job) -> dict[Mesh, Trained]:
    found = {}
    for mesh in MESHES:
        order = job.order(mesh, save_every_steps=SAVED_STEP, micro_batches=2)
        outcome = job.launch(ranks, [order], LAST_STEP)
        saved, last = (job.commit(outcome, order, step) for step in (SAVED_STEP, LAST_STEP))
        verify.verify(job.root, saved)
        found[mesh] = Trained(saved, last, ledger.effective(job.ledger(order)))
    return found


def largest_difference(first: dict[str, NDArray[np.float32]], second: dict[str, NDArray[np.float32]]) -> float:
    """Over the tensors: the norm of the difference relative to the tensor's."""
    assert first.keys() == second.keys()
    return max(float(np.linalg.norm(value - second[name]) / np.linalg.norm(value)) for name, value in first.items())


def samples(records: dict[int, ledger.Record]) -> dict[int, tuple[int, ...]]:
    return {step: record.samples for step, record in records.items()}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_has_the_losses_and_samples_of_one_device(mesh: Mesh, trained: dict[Mesh, Trained]) -> None:
    alone, records = trained[Mesh()].records, trained[mesh].records
    assert list(records) == list(range(1, LAST_STEP + 1))
    assert all(record.loss is not None and len(record.samples) == GLOBAL_BATCH for record in records.values())
    assert samples(records) == samples(alone)
    assert ledger.compare(records, alone).max_loss_difference < TOLERANCE


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_mesh_continues_the_checkpoint_of_every_mesh(
    mesh: Mesh, ranks: Ranks, job: Job, trained: dict[Mesh, Trained]
) -> None:
    """The next step has the undisturbed loss and leaves the undisturbed weights and moments behind."""
    expected = {LAST_STEP: trained[Mesh()].records[LAST_STEP]}
    weights = job.weights(trained[Mesh()].last)
    orders = [job.order(mesh, source.saved) for source in trained.values()]
    outcome = job.launch(ranks, orders, LAST_STEP)
    for source, order in zip(trained, orders, strict=True):
        records = ledger.effective(job.ledger(order))
        assert samples(records) == samples(expected)
        loss_difference = ledger.compare(records, expected).max_loss_difference
        assert loss_difference < TOLERANCE, f"{source} -> {mesh}: {loss_difference}"
        difference = largest_difference(weights, job.weights(job.commit(outcome, order, LAST_STEP)))
        assert difference < TOLERANCE, f"{source} -> {mesh}: {difference}"


def test_other_samples_are_another_loss(ranks: Ranks, job: Job, trained: dict[Mesh, Trained]) -> None:
    """So the comparisons above can fail."""
    order = dataclasses.replace(job.order(Mesh()), seed=8)
    job.launch(ranks, [order], 2)
    difference = ledger.compare(ledger.effective(job.ledger(order)), trained[Mesh()].records)
    assert difference.max_loss_difference > 10 * TOLERANCE
    assert difference.samples_lost and difference.samples_repeated


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
    ranks: Ranks, job: Job, trained: dict[Mesh, Trained]
) -> None:
    order = job.order(Mesh(pp=2, dp_shard=2))
    outcome = job.launch(ranks, [order], 1000, requests=[(2, 1, True)])
    paused = {rank: message["step"] for rank, message in outcome.messages if message["type"] == "paused"}
    assert paused.keys() == {0, 1, 2, 3} and len(set(paused.values())) == 1
    step = paused[0]
    last = [message for rank, message in outcome.messages if rank == 0 and message["type"] == "progress"][-1]
    assert last["step"] == last["loss_step"] == step and last["loss"] is not None
    resumed = job.order(Mesh(tp=2), job.commit(outcome, order, step))
    job.launch(ranks, [resumed], step + 1)
    assert list(ledger.effective(job.ledger(resumed))) == [step + 1]


def test_a_checkpoint_of_other_data_is_refused(ranks: Ranks, job: Job, trained: dict[Mesh, Trained]) -> None:
    order = dataclasses.replace(job.order(Mesh(), trained[Mesh()].saved), seed=8)
    with pytest.raises(AssertionError, match="seed of the data was 7 when the checkpoint was made and is 8 now"):
        job.launch(ranks, [order], LAST_STEP)
