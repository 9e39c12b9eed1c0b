"""Pipelines without ZeRO: which stage's optimizer numbers the parameters of which layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError
from tests.unit.checkpoint.formats.test_deepspeed_zero import data_of, raw

Layers = dict[int, nn.Module]


def save(root: Path, stages: list[list[nn.Module]], files: Layers) -> list[torch.optim.Optimizer]:
    """As DeepSpeed's pipeline engine does: a file per layer, and of every stage one with its optimizer's state."""
    folder = root / "step"
    folder.mkdir()
    optimizers = []
    for index, modules in enumerate(stages):
        parameters = [parameter for module in modules for parameter in module.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter) * (1 + parameter.numel())
        optimizer.step()
        optimizers.append(optimizer)
        content = {
            "module": None,
            "buffer_names": [],
            "optimizer": optimizer.state_dict(),
            "param_shapes": None,
            "checkpoint_parallel_dimensions": {"pp_degree": len(stages), "tp_degree": 1},
            "global_steps": 1,
        }
        torch.save(content, folder / f"mp_rank_{index:02d}_model_states.pt")
    for layer, module in files.items():
        torch.save(module.state_dict(), folder / f"layer_{layer:02d}-model_00-model_states.pt")
    return optimizers


def assert_holds(view: UniversalView, prefix: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for local, parameter in module.named_parameters():
        assert data_of(view, prefix + local) == raw(parameter.data), prefix + local
        for state in ("exp_avg", "exp_avg_sq", "step"):
            assert data_of(view, f"{prefix}{local}.{state}") == raw(optimizer.state[parameter][state]), prefix + local


def test_equal_layers_are_divided_by_the_number_of_parameters(tmp_path: Path) -> None:
    layers = [nn.Linear(3, 3) for _ in range(5)]
    first, second = save(tmp_path, [layers[:2], layers[2:]], {0: layers[0], **dict(enumerate(layers[1:], 2))})
    view = open_checkpoint(tmp_path)
    for layer, module in zip((0, 2, 3, 4, 5), layers, strict=True):
        assert_holds(view, f"{layer}.", module, first if layer < 3 else second)
    names = [f"{layer}.{name}" for layer in (0, 2, 3, 4, 5) for name in ("weight", "bias")]
    assert [group["params"] for group in view.state["param_groups"]] == [names]
    assert not view.aliases
    assert not view.frozen


def test_a_tied_module_comes_first_in_a_stage_whichever_layer_it_serves(tmp_path: Path) -> None:
    embed, one, two = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    again = nn.Embedding(5, 3)
    again.load_state_dict(embed.state_dict())
    first, second = save(tmp_path, [[embed, one], [again, two]], {0: embed, 1: one, 2: two, 3: again})
    view = open_checkpoint(tmp_path)
    assert view.aliases == {"3.weight": "0.weight"}
    assert_holds(view, "0.", embed, first)
    assert_holds(view, "2.", two, second)
    assert "no file says its name" in view.notes[0]


def test_a_tied_module_that_is_used_by_a_function_has_no_file_in_its_stage(tmp_path: Path) -> None:
    embed, one, two = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    again = nn.Embedding(5, 3)
    again.load_state_dict(embed.state_dict())
    first, second = save(tmp_path, [[embed, one], [again, two]], {0: embed, 1: one, 2: two})
    view = open_checkpoint(tmp_path)
    assert_holds(view, "0.", embed, first)
    assert_holds(view, "1.", one, first)
    assert_holds(view, "2.", two, second)


def test_what_does_not_divide_is_refused(tmp_path: Path) -> None:
    layers = [nn.Linear(3, 3) for _ in range(3)]
    save(tmp_path, [layers[:1], layers[2:]], dict(enumerate(layers)))
    with pytest.raises(CheckpointError, match="divide into such stages in no way: train without frozen parameters"):
        open_checkpoint(tmp_path)
