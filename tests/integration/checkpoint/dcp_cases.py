"""Training a small model on a mesh, saving it with torch, and loading it on another: what runs in each rank.

Imported once by a fork server, so that a rank costs a fork instead of an import of torch.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from orchestrator.checkpoint.formats.torch_api import NativeWriter, UniversalReader

WIDTH, HIDDEN, VOCABULARY = 12, 20, 47
STEPS = 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.ones(1))  # one element: empty shards on all ranks but one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """`layers` of the whole model's blocks, under their global names, as a pipeline stage has them."""

    def __init__(self, layers: range, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleDict({str(index): Block() for index in layers})
        self.frozen = nn.Parameter(torch.randn(5, WIDTH), requires_grad=False)
        self.register_buffer("table", torch.randn(3, WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.table.sum() * 0
        for block in self.blocks.values():
            x = block(x)
        return self.head(x)


class Stage(nn.Module):
    """One pipeline stage on its own, trained on what stands for the activations of the one before."""

    def __init__(self, layers: range) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(index): Block() for index in layers})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


def meshes(kind: str) -> tuple[DeviceMesh | None, DeviceMesh | None]:
    """(mesh to shard parameters over, mesh for tensor parallelism)."""
    world = dist.get_world_size()
    if kind == "dp":
        return init_device_mesh("cpu", (world,)), None
    if kind == "hsdp":
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")), None
    if kind == "tp":
        return None, init_device_mesh("cpu", (world,))
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("outer", "inner"))
    return (mesh["outer"], mesh["inner"]) if kind == "dp x tp" else (mesh["inner"], None)


def build(kind: str, case: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(case.get("seed", 1))
    sharded, tensor = meshes(kind)
    if kind == "pp":
        half = dist.get_rank() // 2
        model: nn.Module = Stage(range(half, half + 1))
    else:
        model = Model(range(2), tied=case.get("tied", False)) if not case.get("stages") else Stage(range(2))
    if case.get("bf16"):
        model.to(torch.bfloat16)
    if tensor is not None:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in model.blocks.values():
            parallelize_module(block, tensor, plan)
    if sharded is not None:
        for block in model.blocks.values():
            fully_shard(block, mesh=sharded)
        fully_shard(model, mesh=sharded)
    return model, optimizer(model, case)


def optimizer(model: nn.Module, case: dict[str, Any]) -> torch.optim.Optimizer:
    rate = case.get("rate", 0.01)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not case.get("groups"):
        return torch.optim.AdamW(trained, lr=rate)
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    rest = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": rate / 2}]
    return torch.optim.AdamW(groups, lr=rate)


def train(model: nn.Module, optim: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(100 + step)
        if isinstance(model, Stage):
            dtype = next(model.parameters()).dtype
            loss = model(torch.randn(2, 3, WIDTH, dtype=dtype)).square().sum()
        else:
            loss = model(torch.randint(VOCABULARY, (2, 3))).float().square().mean()
        loss.backward()
        optim.step()
        optim.zero_grad()


def options(case: dict[str, Any]) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=bool(case.get("flattened")))


def save(case: dict[str, Any], directory: Path) -> None:
    model, optim = build(case["mesh"], case)
    train(model, optim, STEPS)
    weights, states = get_state_dict(model, optim, options=options(case))
    state = {"app": {"model": weights, "optim": states}, "scheduler": {"last_epoch": STEPS, "rates": [0.1, 0.2]}}
    dcp.save(state, checkpoint_id=directory / "dcp")
    dcp.save(state, storage_writer=NativeWriter(directory / "native", step=STEPS))


def load(case: dict[str, Any], directory: Path) -> None:
    """Load both saves into a model trained otherwise, and compare everything with torch's own consolidation."""
    expected = torch.load(directory / "whole.pt", weights_only=False)["app"]
    for source in ("dcp", "native"):
        model, optim = build(case["into"], case | {"seed": 9, "rate": 0.5})
        weights, states = get_state_dict(model, optim, options=options(case))
        state = {"model": weights, "optimizer": states, "scheduler": {"last_epoch": 0, "rates": []}}
        dcp.load(state, storage_reader=UniversalReader(directory / source, source=source))
        set_state_dict(
            model, optim, model_state_dict=weights, optim_state_dict=state["optimizer"], options=options(case)
        )
        assert state["scheduler"] == {"last_epoch": STEPS, "rates": [0.1, 0.2]}
        weights, states = get_state_dict(model, optim, options=options(case))
        compare(weights, expected["model"], f"{source} model")
        if case.get("flattened"):
            compare(states, expected["optim"], f"{source} optimizer")
        else:
            compare(states["state"], expected["optim"]["state"], f"{source} optimizer")
            compare_groups(states["param_groups"], expected["optim"]["param_groups"])


def compare(found: Any, expected: Any, where: str) -> None:
    """Equal bit for bit. `expected` may hold more keys: a pipeline stage has its own only."""
    if isinstance(found, dict):
        assert found.keys() <= expected.keys(), where
        for key, value in found.items():
            compare(value, expected[key], f"{where} {key}")
    elif isinstance(found, torch.Tensor):
        whole = found.full_tensor() if isinstance(found, DTensor) else found
        assert whole.dtype == expected.dtype and torch.equal(whole, expected), where
    else:
        assert found == expected, f"{where}: {found} is not {expected}"


def compare_groups(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(found, expected, strict=True):
        for key, value in one.items():
            assert key == "params" or value == other[key], f"{key}: {value} is not {other[key]}"


def rank_main(rank: int, world: int, store: str, jobs: list[tuple[str, dict[str, Any], str]], errors: str) -> None:
    """One rank: all jobs of a world in turn."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        for kind, case, directory in jobs:
            try:
                {"save": save, "load": load}[kind](case, Path(directory))
            except BaseException as error:
                raise AssertionError(f"{kind} {case} at world {world}") from error
        dist.barrier()
    except BaseException:
        Path(f"{errors}.{rank}").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()
