"""Model files with the optimizer inside: names for numbers, where they can be told."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError
from tests.unit.checkpoint.formats.test_deepspeed_zero import data_of, raw


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.two(self.one(self.embed(tokens)))))
        return out


def trained(groups: Any, dtype: torch.dtype = torch.float32) -> tuple[Net, torch.optim.Optimizer, list[list[str]]]:
    """A module after two steps of an optimizer over `groups(module)`, lists of parameters; and the groups' names."""
    torch.manual_seed(1)
    net = Net()
    split = groups(net)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    made = [{"params": list(group), "lr": 0.01 * (1 + index)} for index, group in enumerate(split)]
    optimizer = torch.optim.AdamW(made)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.arange(6)).square().sum().backward()
        optimizer.step()
    return net, optimizer, [[names[id(parameter)] for parameter in group["params"]] for group in made]


def save(root: Path, net: Net, optimizer: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    low = {tensor.data_ptr(): tensor.to(dtype) for tensor in net.state_dict().values() if tensor.is_floating_point()}
    module = OrderedDict((name, low.get(tensor.data_ptr(), tensor)) for name, tensor in net.state_dict().items())
    (root / "step").mkdir(exist_ok=True)
    content = {
        "module": module,
        "buffer_names": [name for name, _ in net.named_buffers()],
        "optimizer": optimizer,
        "param_shapes": None,
        "shared_params": None,
        "global_steps": 2,
    }
    torch.save(content, root / "step" / "mp_rank_00_model_states.pt")


def assert_trained(view: UniversalView, net: Net, optimizer: torch.optim.Optimizer, names: list[list[str]]) -> None:
    assert [group["params"] for group in view.state["param_groups"]] == names
    assert [group["lr"] for group in view.state["param_groups"]] == [0.01 * (1 + index) for index in range(len(names))]
    assert view.aliases == {"head.weight": "embed.weight"}
    parameters = dict(net.named_parameters())
    for name in (name for group in names for name in group):
        assert data_of(view, name) == raw(parameters[name].data), name
        state = optimizer.state[parameters[name]]
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert data_of(view, f"{name}.{key}") == raw(state[key]), name
    assert view.frozen == parameters.keys() - {name for group in names for name in group}
    assert data_of(view, "norm.running_mean") == raw(net.norm.running_mean)


SPLITS: dict[str, Any] = {
    "one": lambda net: [net.parameters()],
    "decay": lambda net: [
        [one for one in net.parameters() if one.ndim > 1],
        [one for one in net.parameters() if one.ndim < 2],
    ],
    "some": lambda net: [[net.embed.weight, net.one.weight, net.two.weight]],
}


@pytest.mark.parametrize("split", SPLITS)
def test_numbers_get_the_names_that_fit(tmp_path: Path, split: str) -> None:
    net, optimizer, names = trained(SPLITS[split])
    save(tmp_path, net, optimizer.state_dict())
    view = open_checkpoint(tmp_path)
    assert view.source == "deepspeed zero 0"
    assert_trained(view, net, optimizer, names)
    assert view.notes == ()


def test_modules_that_are_trained_as_a_whole_are_preferred_and_noted(tmp_path: Path) -> None:
    net, optimizer, names = trained(lambda net: [[net.one.weight, net.one.bias, net.norm.weight, net.norm.bias]])
    net.two = nn.Linear(5, 4)  # its bias would fit, its weight does not
    save(tmp_path, net, optimizer.state_dict())
    view = open_checkpoint(tmp_path)
    assert_trained(view, net, optimizer, names)
    assert "of modules that are trained as a whole" in view.notes[0]
    net.two = nn.Linear(4, 4)  # both of them would
    save(tmp_path, net, optimizer.state_dict())
    with pytest.raises(CheckpointError, match="several ways"):
        open_checkpoint(tmp_path)


def masters(net: Net, optimizer: torch.optim.Optimizer, flat: bool) -> dict[str, Any]:
    groups = [[one.data.clone() for one in group["params"]] for group in optimizer.param_groups]
    inner = optimizer.state_dict()
    found: dict[str, Any] = {"dynamic_loss_scale": True, "cur_scale": 1024.0, "optimizer_state_dict": inner}
    if not flat:
        return found | {"fp32_groups": groups}
    number = iter(range(100))
    states = {}
    for index, group in enumerate(optimizer.param_groups):
        members = [inner["state"][next(number)] for _ in group["params"]]
        states[index] = {key: torch.cat([one[key].flatten() for one in members]) for key in ("exp_avg", "exp_avg_sq")}
        inner["param_groups"][index] |= {"params": [index], "step": 2}
    inner["state"] = states
    return found | {"fp32_groups_flat": [torch.cat([one.flatten() for one in group]) for group in groups]}


@pytest.mark.parametrize("flat", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masters_tell_their_names(tmp_path: Path, flat: bool, dtype: torch.dtype) -> None:
    """Equal shapes, in groups of which no order follows: what the masters round to decides."""
    net, optimizer, names = trained(lambda net: [[net.two.weight, net.norm.bias], [net.one.weight, net.two.bias]])
    save(tmp_path, net, masters(net, optimizer, flat), dtype)
    view = open_checkpoint(tmp_path)
    trainable = [name for group in names for name in group]
    assert [group["params"] for group in view.state["param_groups"]] == names
    assert view.training_dtypes == dict.fromkeys(trainable, "F16" if dtype == torch.float16 else "BF16")
    for name in trainable:
        parameter = dict(net.named_parameters())[name]
        assert data_of(view, name) == raw(parameter.data)
        assert data_of(view, f"{name}.exp_avg") == raw(optimizer.state[parameter]["exp_avg"])
        assert data_of(view, f"{name}.step") == raw(torch.tensor(2.0))
    assert view.state["cur_scale"] == 1024.0


def test_a_transposed_master_has_the_name_of_a_transposed_weight(tmp_path: Path) -> None:
    net, optimizer, names = trained(lambda net: [[net.embed.weight, net.one.weight, net.one.bias]])
    module = OrderedDict((name, tensor.to(torch.bfloat16)) for name, tensor in net.state_dict().items())
    module["one.weight"] = module["one.weight"].t().contiguous().t()
    inside = masters(net, optimizer, flat=False)
    inside["fp32_groups"][0][1] = inside["fp32_groups"][0][1].t().contiguous().t()
    save(tmp_path, net, inside)
    content = torch.load(tmp_path / "step" / "mp_rank_00_model_states.pt", weights_only=False)
    torch.save(content | {"module": module}, tmp_path / "step" / "mp_rank_00_model_states.pt")
    view = open_checkpoint(tmp_path)
    assert [group["params"] for group in view.state["param_groups"]] == names
    assert data_of(view, "one.weight") == raw(net.one.weight.data)


def test_no_name_is_guessed(tmp_path: Path) -> None:
    net, optimizer, _ = trained(lambda net: [[net.one.weight], [net.two.weight]])
    save(tmp_path, net, optimizer.state_dict())
    with pytest.raises(CheckpointError, match="numbers the optimizer's parameters, and there are several ways"):
        open_checkpoint(tmp_path)
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(9, 9)  # of no parameter
    save(tmp_path, net, state)
    with pytest.raises(CheckpointError, match="there is no way"):
        open_checkpoint(tmp_path)


def test_weights_alone(tmp_path: Path) -> None:
    save(tmp_path, Net(), None)  # type: ignore[arg-type]
    view = open_checkpoint(tmp_path)
    assert "embed.weight" in view.tensors
    assert not view.frozen
    assert view.state["param_groups"] == []
