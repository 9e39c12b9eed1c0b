"""DeepSpeed's mixture-of-experts layers: ranks name their experts from 0 on, files name them in the whole layer."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.core.errors import CheckpointError
from tests.unit.checkpoint.formats.deepspeed_writer import Layout, Model, contents, deepspeed_names, model
from tests.unit.checkpoint.formats.test_deepspeed_zero import assert_holds, data_of, raw

MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
EXPERT = "layer_{}_expert_{}_mp_rank_00_model_states.pt"
GATES = [f"{block}.moe.deepspeed_moe.gate.wg.weight" for block in (0, 1)]
LAYERS = [f"{block}.moe.deepspeed_moe.experts.deepspeed_experts." for block in (0, 1)]
DENSE: list[tuple[str, tuple[int, ...]]] = [("in.weight", (3, 5)), (GATES[0], (4, 3)), (GATES[1], (6, 3))]
COUNTS = (4, 6)
"""Experts of each layer."""


def own(teams: int, seed: int) -> Model:
    """The experts of one team under the names that its ranks have for them."""
    names = [f"{layer}{at}." for layer, count in zip(LAYERS, COUNTS, strict=True) for at in range(count // teams)]
    shapes: list[tuple[str, tuple[int, ...]]] = [(f"{name}up", (3, 5)) for name in names]
    shapes += [(f"{name}down", (7,)) for name in names]
    return model([shapes], seed=seed)


def whole_name(name: str, team: int, teams: int) -> str:
    """The name in the whole layer."""
    for layer, count in zip(LAYERS, COUNTS, strict=True):
        if name.startswith(layer):
            at, _, rest = name.removeprefix(layer).partition(".")
            return f"{layer}{team * count // teams + int(at)}.{rest}"
    return name


def both(one: Any, other: Any) -> Any:
    """Two optimizer states as one of two groups."""
    joined = one | {
        key: [*one[key], *other[key]]
        for key in ("single_partition_of_fp32_groups", "partition_count", "group_paddings", "param_slice_mappings")
    }
    first, second = one["base_optimizer_state"], other["base_optimizer_state"]
    groups = [*first["param_groups"], second["param_groups"][0] | {"params": [1], "lr": 0.5}]
    return joined | {
        "base_optimizer_state": {"state": {0: first["state"][0], 1: second["state"][0]}, "param_groups": groups}
    }


def saved(folder: Path, world: int, teams: int, *, consecutive: bool = False) -> dict[str, torch.Tensor]:
    """Writes a checkpoint whose experts are divided over so many teams; returns what it is of."""
    dense = model([DENSE], seed=99)
    experts = [own(teams, seed) for seed in range(teams)]
    files = contents(dense, Layout(2, world))
    parts = [contents(one, Layout(2, world // teams)) for one in experts]
    for rank in range(world):
        team, place = divmod(rank, world // teams) if consecutive else (rank % teams, rank // teams)
        inside = files[OPTIMIZER.format(rank)]
        other = parts[team][OPTIMIZER.format(place)]["optimizer_state_dict"]
        inside["optimizer_state_dict"] = both(inside["optimizer_state_dict"], other)
    files[MODEL]["param_shapes"] += parts[0][MODEL]["param_shapes"]
    files[MODEL] |= {"num_experts": list(COUNTS), "ds_config": {"use_data_before_expert_parallelism": consecutive}}
    folder.mkdir(parents=True, exist_ok=True)
    expected = dense.expected()
    for team, one in enumerate(experts):
        expected |= {whole_name(name, team, teams): tensor for name, tensor in one.expected().items()}
    for at, (layer, count) in enumerate(zip(LAYERS, COUNTS, strict=True)):
        for expert in range(count):
            names = [f"{layer}{expert}.{rest}" for rest in ("up", "down")]
            files[EXPERT.format(at, expert)] = OrderedDict((name, expected[name]) for name in names)
    with deepspeed_names():
        for name, content in files.items():
            torch.save(content, folder / name)
    return expected


@pytest.mark.parametrize(("world", "teams"), [(1, 1), (2, 1), (2, 2), (4, 2), (6, 2)])
@pytest.mark.parametrize("consecutive", [False, True])
def test_each_team_has_its_experts(tmp_path: Path, world: int, teams: int, consecutive: bool) -> None:
    expected = saved(tmp_path, world, teams, consecutive=consecutive)
    view = open_checkpoint(tmp_path, source="deepspeed")
    assert_holds(view, expected)
    dense, experts = view.state["param_groups"]
    assert dense["params"] == [name for name, _ in DENSE]
    assert len(experts["params"]) == 2 * sum(COUNTS)
    assert experts["lr"] == 0.5
    assert not view.frozen
    assert view.notes == ()


def test_every_expert_has_its_file(tmp_path: Path) -> None:
    saved(tmp_path, 4, 2)
    (tmp_path / EXPERT.format(1, 5)).unlink()
    with pytest.raises(CheckpointError, match=r"expert_5_mp_rank_00_model_states\.pt is corrupt: it is missing"):
        open_checkpoint(tmp_path, source="deepspeed")


@pytest.mark.parametrize(("owners", "teams"), [(2, 2), (2, 1), (1, 1)])
def test_without_zero_every_owner_saves_its_optimizer(tmp_path: Path, owners: int, teams: int) -> None:
    """In the module's order the experts of a layer come behind its gate."""
    order = [DENSE[0][0], GATES[0], LAYERS[0], GATES[1], LAYERS[1]]
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in DENSE}
    for at, (layer, count) in enumerate(zip(LAYERS, COUNTS, strict=True)):
        for expert in range(count):
            names = [f"{layer}{expert}.{rest}" for rest in ("up", "down")]
            weights |= {names[0]: torch.randn(3, 5), names[1]: torch.randn(7)}
            torch.save(OrderedDict((name, weights[name]) for name in names), tmp_path / EXPERT.format(at, expert))
    moments = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    for owner in range(owners):
        held: list[str] = []
        for name in order:
            count = dict(zip(LAYERS, COUNTS, strict=True)).get(name, 0) // teams
            first = owner % teams * count
            experts = [f"{name}{expert}.{rest}" for expert in range(first, first + count) for rest in ("up", "down")]
            held += experts or [name]
        state = {at: {"step": torch.tensor(1.0), "exp_avg": moments[name]} for at, name in enumerate(held)}
        group = {"lr": 0.1, "params": list(range(len(held)))}
        optimizer = {"state": state, "param_groups": [group]}
        torch.save({"optimizer": optimizer}, tmp_path / f"expp_rank_{owner}_mp_rank_00_optim_states.pt")
    module = OrderedDict((name, weights[name]) for name, _ in DENSE)
    content = {"module": module, "buffer_names": [], "optimizer": optimizer, "num_experts": list(COUNTS)}
    torch.save(content | {"global_steps": 1, "dp_world_size": owners}, tmp_path / MODEL)
    view = open_checkpoint(tmp_path, source="deepspeed")
    for name, tensor in weights.items():
        assert data_of(view, name) == raw(tensor), name
        assert data_of(view, f"{name}.exp_avg") == raw(moments[name]), name


def test_experts_of_autoep_are_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 2, 2)
    content = torch.load(tmp_path / MODEL, weights_only=False)
    torch.save(content | {"ds_autoep_layers": [{"moe_layer_id": 0}]}, tmp_path / MODEL)
    with pytest.raises(CheckpointError, match="AutoEP took over"):
        open_checkpoint(tmp_path, source="deepspeed")
