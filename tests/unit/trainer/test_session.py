"""A session of one rank: alone, under an order, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator import ledger, wire
from orchestrator.checkpoint import store
from orchestrator.checkpoint.formats import native
from orchestrator.core.errors import CheckpointError, InvalidInput
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
from orchestrator.trainer import Batch, Session, session


class Numbers:
    """Sample i is the number i."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REGROW_ORDER", "REGROW_SOCKET", "REGROW_LEDGER", "MASTER_ADDR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REGROW_DEVICE", "cpu")


@pytest.fixture
def sessions() -> Iterator[list[Session]]:
    """Sessions to close after the test."""
    opened: list[Session] = []
    yield opened
    for one in opened:
        one.close()


def order(root: Path | None, **more: Any) -> LaunchOrder:
    plan = Plan(Mesh(), BatchSplit(4, 2, 2, (4,)))
    settings: dict[str, Any] = {
        "checkpoint_uri": str(root) if root else "",
        "checkpoint_path": None,
        "save_every_s": None,
        "save_every_steps": None,
        "seed": 3,
    }
    return LaunchOrder(
        job="job",
        generation=Generation(1, plan, Assignment((AssignedNode("a", 0, 1),))),
        entrypoint=Entrypoint(""),
        store=None,
        **settings | more,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: LaunchOrder) -> None:
    (tmp_path / "order.json").write_text(wire.dumps(given))
    monkeypatch.setenv("REGROW_ORDER", str(tmp_path / "order.json"))
    monkeypatch.setenv("REGROW_LEDGER", str(tmp_path / "ledger"))


class Trainer:
    """One linear weight that learns the mean of the samples."""

    def __init__(self, session: Session) -> None:
        self.session = session
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        session.track(model=self.model, optimizer=self.optimizer)

    def step(self, batch: Batch) -> None:
        total = torch.zeros(())
        for micro in batch.micro_batches():
            loss = micro.loss((self.model(torch.ones_like(micro.data)) - micro.data).square().flatten())
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.session.step(loss=total)

    def run(self, steps: int) -> list[tuple[int, ...]]:
        seen = []
        for batch in self.session.batches(Numbers(), steps=steps):
            seen.append(batch.samples)
            self.step(batch)
        return seen


def test_a_script_of_its_own_needs_no_order(sessions: list[Session]) -> None:
    sessions.append(one := Session(global_batch=4, micro_batch=3, seed=1))
    assert (one.rank, one.replica, one.plan.mesh) == (0, 0, Mesh())
    assert one.mesh.mesh_dim_names == ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    trainer = Trainer(one)
    assert [len(samples) for samples in trainer.run(5)] == [4] * 5
    assert one.completed == 5
    assert trainer.run(5) == []


def test_epochs_end_after_whole_global_batches(sessions: list[Session]) -> None:
    sessions.append(one := Session(global_batch=4))
    trainer = Trainer(one)
    samples = []
    for batch in one.batches(Numbers(), epochs=2):
        samples += batch.samples
        trainer.step(batch)
    assert one.completed == 5
    assert sorted(samples) == sorted(2 * list(range(10)))


def test_saves_come_when_due_and_at_the_end_and_are_continued_exactly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path, sessions: list[Session]
) -> None:
    reports: list[SaveReport] = []
    monkeypatch.setattr(session.Channel, "saved", lambda _, report: reports.append(report))
    give(monkeypatch, tmp_path, order(root, save_every_steps=2))
    sessions.append(one := Session())
    trainer = Trainer(one)
    trainer.run(5)
    assert {2, 5} <= {report.step for report in reports} <= {2, 4, 5}  # 4 is put off while 2 is being written
    assert sorted(step for step in ledger.effective(tmp_path / "ledger")) == [1, 2, 3, 4, 5]
    path = store.commit(root, generation=1, step=2, world_size=1, parts=[reports[0]]).path

    give(monkeypatch, tmp_path, order(root, checkpoint_path=path))
    sessions.append(other := Session())
    resumed = Trainer(other)
    assert other.completed == 2
    assert len(resumed.run(5)) == 3
    assert torch.equal(resumed.model.weight, trainer.model.weight)


def test_the_losses_in_the_ledger_are_the_mean_over_the_global_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sessions: list[Session]
) -> None:
    give(monkeypatch, tmp_path, order(None))
    progress: dict[int, float] = {}

    def note(_: object, step: int, loss: float | None, loss_step: int | None) -> None:
        if loss is not None and loss_step is not None:
            progress[loss_step] = loss

    monkeypatch.setattr(session.Channel, "progress", note)
    sessions.append(one := Session())
    trainer = Trainer(one)
    expected = {}
    for batch in one.batches(Numbers(), steps=3):
        weight = trainer.model.weight.item()
        expected[batch.step + 1] = sum((weight - sample) ** 2 for sample in batch.samples) / 4
        trainer.step(batch)
    records = ledger.effective(tmp_path / "ledger")
    assert {step: record.loss for step, record in records.items()} == pytest.approx(expected)
    assert progress == pytest.approx(expected)


def test_a_save_that_falls_due_during_a_write_comes_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path, sessions: list[Session]
) -> None:
    going_on, started, written = threading.Event(), threading.Event(), []
    write_part = native.write_part

    def slow(*args: Any, **more: Any) -> SaveReport:
        started.set()
        assert going_on.wait(60)
        written.append(more["step"])
        return write_part(*args, **more)

    monkeypatch.setattr(native, "write_part", slow)
    give(monkeypatch, tmp_path, order(root, save_every_steps=1))
    sessions.append(one := Session())
    trainer = Trainer(one)
    for batch in one.batches(Numbers(), steps=6):
        trainer.step(batch)
        if batch.step == 0:
            assert started.wait(60)
        if batch.step == 3:
            going_on.set()
            one._saver.wait()  # type: ignore[union-attr]
    assert written[0] == 1 and written[-1] == 6
    assert not {2, 3, 4} & set(written)


def test_a_full_disk_skips_saves_without_ending_training_but_the_last_one_must_succeed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    root: Path,
    sessions: list[Session],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any, **__: Any) -> SaveReport:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(native, "write_part", full)
    give(monkeypatch, tmp_path, order(root, save_every_steps=1))
    sessions.append(one := Session())
    trainer = Trainer(one)
    with pytest.raises(CheckpointError, match="the state after step 4 could not be saved: the disk is full"):
        trainer.run(4)
    assert one.completed == 4
    assert "regrow: step 1 was not saved by rank 0: the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize("calls", [0, 2])
def test_step_is_called_once_per_batch(sessions: list[Session], calls: int) -> None:
    sessions.append(one := Session())
    one.track(model=nn.Linear(1, 1))
    with pytest.raises(InvalidInput, match=f"session.step was called {calls} times for the batch of step 1"):
        for _ in one.batches(Numbers(), steps=2):
            for _ in range(calls):
                one.step()


def test_the_order_of_calls_is_checked(sessions: list[Session]) -> None:
    sessions.append(one := Session())
    with pytest.raises(InvalidInput, match=r"session\.batches was called before session\.track"):
        next(iter(one.batches(Numbers())))
    with pytest.raises(InvalidInput, match=r"session\.clip_grad_norm was called before session\.track"):
        one.clip_grad_norm(1.0)


def test_an_empty_dataset_is_refused(sessions: list[Session]) -> None:
    sessions.append(one := Session())
    one.track(model=nn.Linear(1, 1))
    with pytest.raises(InvalidInput, match="empty dataset"):
        next(iter(one.batches(Numbers(0))))


def test_a_mesh_of_another_size_than_the_world_is_refused() -> None:
    with pytest.raises(InvalidInput, match="the mesh tp 2 has 2 ranks but WORLD_SIZE is 1"):
        Session(mesh=Mesh(tp=2), global_batch=2)


def test_a_batch_that_cannot_feed_every_replica_is_refused() -> None:
    with pytest.raises(InvalidInput, match="a global batch of 1 cannot feed 3 data-parallel replicas"):
        Session(mesh=Mesh(dp_shard=3), global_batch=1)


@pytest.mark.parametrize(("text", "message"), [("{", "message is not JSON"), ("{}", "message does not fit")])
def test_an_order_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "order.json").write_text(text)
    monkeypatch.setenv("REGROW_ORDER", str(tmp_path / "order.json"))
    with pytest.raises(InvalidInput, match=message):
        Session()


def test_an_order_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_ORDER", "/nowhere/order.json")
    with pytest.raises(InvalidInput, match=r"cannot read the launch order /nowhere/order\.json"):
        Session()


def test_random_numbers_depend_on_step_and_sample_alone(sessions: list[Session]) -> None:
    sessions.append(one := Session(seed=1))
    draws = {
        (step, sample): torch.rand(1, generator=one.generator(step, sample)).item()
        for step in range(3)
        for sample in range(3)
    }
    assert len(set(draws.values())) == 9
    assert draws[2, 1] == torch.rand(1, generator=one.generator(2, 1)).item()


def test_clipping_on_one_rank_is_torchs(sessions: list[Session]) -> None:
    sessions.append(one := Session())
    model, reference = nn.Linear(5, 3), nn.Linear(5, 3)
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        parameter.grad = torch.randn_like(parameter)
        other.grad = parameter.grad.clone()
    one.track(model=model)
    for max_norm in (0.5, 100.0):
        norm = one.clip_grad_norm(max_norm)
        expected = nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
        torch.testing.assert_close(norm, expected)
        for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad)


SCRIPT = """
import atexit, sys
import torch.distributed as dist
from orchestrator.trainer import Session
atexit.register(lambda: print("left" if not dist.is_initialized() else "stayed"))
session = Session()
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("", 0, "left"), ("sys.exit(3)", 3, "left"), ("raise ValueError('no')", 1, "stayed")],
)
def test_a_script_that_ends_leaves_the_group_before_the_interpreter_goes(end: str, code: int, said: str) -> None:
    """A thread of gloo that is still busy then would abort the process. After an exception it may wait for peers."""
    command = [sys.executable, "-c", SCRIPT + end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (code, said), done.stderr
