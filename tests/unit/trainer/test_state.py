"""Names of the training state, and what survives a save and a restore on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.checkpoint import store
from orchestrator.checkpoint.formats import native
from orchestrator.core.errors import CheckpointError, InvalidInput
from orchestrator.core.types import Mesh, SaveReport
from orchestrator.trainer.chunks import Snapshot, chunks
from orchestrator.trainer.layouts import Layouts
from orchestrator.trainer.restore import restore
from orchestrator.trainer.state import Tracked

ALONE = Layouts(Mesh(), 0)


class Model(nn.Module):
    def __init__(self, hidden: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(2, hidden, dtype=dtype)
        self.frozen = nn.Parameter(torch.rand(2, dtype=dtype), requires_grad=False)
        self.register_buffer("seen", torch.tensor([7], dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def adam(model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() == 1 and parameter.requires_grad]
    return torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.1, **more)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.rand_like(parameter)
    optimizer.step()


def save(root: Path, tracked: Tracked) -> native.UniversalView:
    pieces = Snapshot().copy(chunks(tracked.entries(), ALONE))
    report = native.write_part(
        root, generation=1, step=5, rank=0, world_size=1, pieces=pieces, state=tracked.json_state(), stall_s=0.0
    )
    return open_committed(root, report)


def open_committed(root: Path, report: SaveReport) -> native.UniversalView:
    done = store.commit(root, generation=1, step=report.step, world_size=1, parts=[report])
    return native.open_view(root, done.path)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    yield from model.state_dict().values()
    for parameter in model.parameters():
        yield from (value for _, value in sorted(optimizer.state.get(parameter, {}).items()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_restored_model_and_optimizer_equal_the_saved_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Model(dtype=dtype)
    optimizer = adam(model, betas=(0.8, 0.9), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        train(model, optimizer)
        scheduler.step()
    view = save(tmp_path, Tracked([model], optimizer, {"scheduler": scheduler}))

    other = Model(dtype=dtype)
    fresh = adam(other, amsgrad=True)
    resumed = torch.optim.lr_scheduler.ExponentialLR(fresh, 0.5)
    restore(view, Tracked([other], fresh, {"scheduler": resumed}), ALONE)
    assert all(
        torch.equal(one, two) for one, two in zip(state_of(model, optimizer), state_of(other, fresh), strict=True)
    )
    assert [group["lr"] for group in fresh.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert fresh.param_groups[0]["betas"] == (0.8, 0.9)
    assert resumed.last_epoch == 3
    for tracked_model, tracked_optimizer in ((model, optimizer), (other, fresh)):
        torch.manual_seed(0)
        train(tracked_model, tracked_optimizer)
    assert torch.equal(model.first.weight, other.first.weight)


def test_names_are_those_of_the_checkpoint_contract() -> None:
    model = Model()
    optimizer = adam(model)
    train(model, optimizer)
    entries = list(Tracked([model], optimizer, {}).entries())
    assert {(entry.name, entry.kind) for entry in entries} == {
        ("first.weight", "parameter"),
        ("first.bias", "parameter"),
        ("frozen", "parameter"),
        ("seen", "buffer"),
        *(
            (f"first.{name}.{state}", "state")
            for name in ("weight", "bias")
            for state in ("exp_avg", "exp_avg_sq", "step")
        ),
    }


def test_hyper_parameters_are_kept_by_group_and_parameter_name() -> None:
    model = Model()
    groups = Tracked([model], adam(model), {}).json_state()["param_groups"]
    assert [group["params"] for group in groups] == [["first.weight"], ["first.bias"]]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert groups[0]["betas"] == [0.9, 0.999]


def test_a_learning_rate_that_is_a_tensor_stays_one(tmp_path: Path) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25))
    state = Tracked([model], optimizer, {}).json_state()
    other = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    Tracked([model], other, {}).load_json_state(state)
    assert torch.equal(other.param_groups[0]["lr"], torch.tensor(0.25))


def test_wrappers_leave_no_trace_in_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(1, 1)), torch.compile(nn.Linear(1, 1), backend="eager"))
    assert sorted(Tracked([model], None, {}).parameters) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_a_checkpoint_in_another_dtype_is_cast(tmp_path: Path) -> None:
    view = save(tmp_path, Tracked([model := Model()], None, {}))
    other = Model(dtype=torch.bfloat16)
    restore(view, Tracked([other], None, {}), ALONE)
    assert torch.equal(other.first.weight, model.first.weight.bfloat16())


def test_a_tensor_that_is_not_contiguous_is_saved_and_restored(tmp_path: Path) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    view = save(tmp_path, Tracked([model], None, {}))
    other = nn.Module()
    other.weight = nn.Parameter(torch.zeros(2, 3).t())
    restore(view, Tracked([other], None, {}), ALONE)
    assert torch.equal(model.weight, other.weight)


def test_a_snapshot_is_not_changed_by_training_on(tmp_path: Path) -> None:
    model = Model()
    snapshot = Snapshot()
    pieces = snapshot.copy(chunks(Tracked([model], None, {}).entries(), ALONE))
    before = [bytes(piece.data) for piece in pieces]
    with torch.no_grad():
        model.first.weight.zero_()
    assert [bytes(piece.data) for piece in pieces] == before
    after = snapshot.copy(chunks(Tracked([model], None, {}).entries(), ALONE))
    assert [bytes(piece.data) for piece in after] != before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Model(hidden=4), r"first.weight has shape \(3, 2\) in the checkpoint of step 5 but \(4, 2\) in the model"),
        (nn.Linear(1, 1), "the checkpoint of step 5 has no weight: it was made by another model"),
    ],
    ids=["shape", "name"],
)
def test_another_model_is_refused(tmp_path: Path, other: nn.Module, message: str) -> None:
    view = save(tmp_path, Tracked([Model()], None, {}))
    with pytest.raises(CheckpointError, match=message):
        restore(view, Tracked([other], None, {}), ALONE)


class Odd:
    def state_dict(self) -> dict[str, Any]:
        return {"weights": torch.zeros(2)}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


def test_extra_state_must_be_plain_data() -> None:
    with pytest.raises(InvalidInput, match="is not plain data"):
        Tracked([Model()], None, {"ema": Odd()}).json_state()


def test_extra_state_that_the_checkpoint_lacks_is_an_error(tmp_path: Path) -> None:
    view = save(tmp_path, Tracked([Model()], None, {}))
    with pytest.raises(InvalidInput, match="no state for 'ema'"):
        restore(view, Tracked([Model()], None, {"ema": Odd()}), ALONE)


def test_an_optimizer_of_another_model_is_refused() -> None:
    optimizer = adam(Model())
    with pytest.raises(InvalidInput, match="not in the tracked model"):
        Tracked([Model()], optimizer, {}).json_state()


def test_two_stages_with_one_name_are_refused() -> None:
    with pytest.raises(InvalidInput, match="two tracked modules have a parameter frozen"):
        Tracked([Model(), Model()], None, {})


def test_a_state_that_is_not_a_tensor_is_refused() -> None:
    model = Model()
    optimizer = adam(model)
    optimizer.state[model.first.weight]["step"] = 3
    with pytest.raises(InvalidInput, match=r"optimizer state 'step' of first\.weight is a int"):
        list(Tracked([model], optimizer, {}).entries())


def test_the_snapshot_is_allocated_once() -> None:
    snapshot = Snapshot()
    entries = chunks(Tracked([Model()], None, {}).entries(), ALONE)
    first = [piece.data.obj.ctypes.data for piece in snapshot.copy(entries)]
    second = [piece.data.obj.ctypes.data for piece in snapshot.copy(entries)]
    assert first == second
