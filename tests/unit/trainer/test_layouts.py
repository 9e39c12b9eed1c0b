"""Boxes and owners over whole meshes: together the ranks save every element exactly once, without talking.

Every rank is a fork of this process with a fake process group: placements are real, nothing is sent.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.reshard import flaw
from orchestrator.core.types import AXES, Mesh
from orchestrator.trainer.chunks import chunks
from orchestrator.trainer.layouts import Layout, Layouts, local_tensor
from orchestrator.trainer.preload import preload
from orchestrator.trainer.state import Tracked

T = TypeVar("T")
EXAMPLE = Path(__file__).parents[3] / "deploy" / "examples" / "gpt"


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """So that the forked ranks need not import."""
    preload()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example's `parallel` module."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield importlib.import_module("parallel")
    for name in ("parallel", "model"):
        sys.modules.pop(name, None)


def as_rank(mesh: Mesh, rank: int, work: Callable[[DeviceMesh], T]) -> T:
    """What `work` returns as `rank` of `mesh`; in a child, because torch interns what it knows of a mesh."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read)
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(attempt(mesh, rank, work), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        result, trace = pickle.load(pipe)
    os.waitpid(pid, 0)
    assert trace is None, trace
    found: T = result
    return found


def attempt(mesh: Mesh, rank: int, work: Callable[[DeviceMesh], T]) -> tuple[T | None, str | None]:
    try:
        dist.init_process_group("fake", rank=rank, world_size=mesh.world_size, store=FakeStore())
        return work(init_device_mesh("cpu", mesh.sizes, mesh_dim_names=AXES)), None
    except BaseException:
        return None, traceback.format_exc()


class Plain(torch.nn.Module):
    """Odd sizes: some ranks get a smaller shard, some none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(35.0).reshape(7, 5))
        self.bias = torch.nn.Parameter(torch.arange(2.0))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def adam_with_states(model: torch.nn.Module) -> torch.optim.Optimizer:
    """States as after a first step, which a fake group cannot take."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


class Saved(NamedTuple):
    """One chunk that a rank saves."""

    name: str
    shape: tuple[int, ...]
    box: Box
    size_bytes: int


def saved(model: torch.nn.Module, mesh: Mesh, rank: int) -> list[Saved]:
    chosen = chunks(Tracked([model], adam_with_states(model), {}).entries(), Layouts(mesh, rank))
    return [Saved(item.entry.name, tuple(item.entry.tensor.shape), item.box, item.size_bytes) for item in chosen]


def flaws(ranks: list[list[Saved]]) -> dict[str, str]:
    """Tensor -> which of its elements are missing or repeated."""
    found: dict[str, list[Saved]] = defaultdict(list)
    for item in (item for rank in ranks for item in rank):
        found[item.name].append(item)
    reasons = {name: flaw(items[0].shape, [item.box for item in items]) for name, items in found.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


MESHES = [
    Mesh(),
    Mesh(dp_shard=3),
    Mesh(dp_shard=8),
    Mesh(dp_replicate=5),
    Mesh(dp_replicate=2, dp_shard=3),
    Mesh(dp_replicate=2, dp_shard=2, cp=2, tp=2),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_uneven_and_empty_shards_and_replicas_are_saved_exactly_once(mesh: Mesh) -> None:
    def work(device_mesh: DeviceMesh) -> list[Saved]:
        model = Plain()
        fully_shard(model, mesh=device_mesh["dp_replicate", "dp_shard"])
        return saved(model, mesh, dist.get_rank())

    ranks = [as_rank(mesh, rank, work) for rank in range(mesh.world_size)]
    states = {f"{name}.{state}" for name in ("weight", "bias") for state in ("step", "exp_avg", "exp_avg_sq")}
    assert {item.name for rank in ranks for item in rank} == states | {"weight", "bias", "count"}
    assert not flaws(ranks)
    elements = Counter[str]()
    for item in (item for rank in ranks for item in rank):
        elements[item.name] += item.box.elements
    assert elements["weight"] == elements["weight.exp_avg"] == 35 and elements["bias"] == 2
    assert elements["bias.step"] == elements["count"] == 1


EXAMPLE_MESHES = [
    Mesh(pp=2, dp_replicate=2, dp_shard=2, tp=2),
    Mesh(dp_shard=3, tp=2),
    Mesh(dp_replicate=2, dp_shard=3, tp=4),
    Mesh(pp=3, dp_shard=5),
    Mesh(dp_shard=5, cp=2, tp=2),
]


@pytest.mark.parametrize("mesh", EXAMPLE_MESHES, ids=str)
def test_the_examples_shards_are_saved_exactly_once(mesh: Mesh, example: Any) -> None:
    """Tensor and data parallel split one dimension in turn (strided shards); pipeline stages hold different layers."""
    config = example.Config(layers=3, hidden=24, heads=4, kv_heads=4, ffn_hidden=20, vocab=12, seq_length=4)

    def work(device_mesh: DeviceMesh) -> list[Saved]:
        stage, each = device_mesh["pp"].get_local_rank(), config.layers // mesh.pp
        last = config.layers if stage == mesh.pp - 1 else (stage + 1) * each
        model = example.GPT(config, range(stage * each, last))
        if mesh.tp > 1:
            example.shard_tensors(model, device_mesh["tp"])
        example.shard_data(model, device_mesh)
        return saved(model, mesh, dist.get_rank())

    ranks = [as_rank(mesh, rank, work) for rank in range(mesh.world_size)]
    assert not flaws(ranks)
    with torch.device("meta"):
        whole = {name: tuple(value.shape) for name, value in example.GPT(config).named_parameters()}
    assert {item.name: item.shape for rank in ranks for item in rank if item.name in whole} == whole
    assert all(sum(item.size_bytes for item in rank) > 0 for rank in ranks), "replicas share the work"


@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2, tp=2), Mesh(dp_shard=3, tp=2), Mesh(dp_shard=3, tp=4)], ids=str)
def test_a_box_is_where_the_local_elements_come_from(mesh: Mesh, example: Any) -> None:
    config = example.Config(layers=1, hidden=16, heads=4, kv_heads=4, ffn_hidden=20, vocab=12, seq_length=4)

    def work(device_mesh: DeviceMesh) -> list[str]:
        model = example.GPT(config)
        whole = {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.arange(float(parameter.numel())).view_as(parameter))
                whole[name] = parameter.detach().clone()
        example.shard_tensors(model, device_mesh["tp"])
        example.shard_data(model, device_mesh)
        layouts = Layouts(mesh, dist.get_rank())
        return [
            name
            for name, parameter in model.named_parameters()
            if not torch.equal(local_tensor(parameter.detach()), whole[name][layouts.of(parameter).box.slices])
        ]

    for rank in range(mesh.world_size):
        assert as_rank(mesh, rank, work) == []


def test_the_copies_of_a_chunk_are_numbered_by_the_axes_that_do_not_shard_it() -> None:
    mesh = Mesh(pp=2, dp_replicate=2, dp_shard=2, tp=2)

    def work(device_mesh: DeviceMesh) -> tuple[Layout, Layout]:
        tensor = DTensor.from_local(torch.zeros(2, 2), device_mesh["dp_shard"], [Shard(0)])
        layouts = Layouts(mesh, dist.get_rank())
        return layouts.of(tensor), layouts.of(torch.zeros(3))

    seen = defaultdict(set)
    for rank in range(mesh.world_size):
        sharded, plain = as_rank(mesh, rank, work)
        seen[mesh.coordinate(rank)["pp"], sharded.box].add(sharded.index)
        assert sharded.copies == 4 and plain.copies == 8
    assert all(indices == {0, 1, 2, 3} for indices in seen.values()) and len(seen) == 4


def test_a_flattened_mesh_counts_for_the_axes_it_was_made_of() -> None:
    mesh = Mesh(dp_shard=2, cp=2, tp=2)

    def work(device_mesh: DeviceMesh) -> Layout:
        flat = device_mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
        return Layouts(mesh, 5).of(DTensor.from_local(torch.zeros(1, 2), flat, [Shard(0)]))

    assert as_rank(mesh, 5, work) == Layout(Box((2, 0), (1, 2)), copies=2, index=1)


def test_partial_sums_are_refused() -> None:
    mesh = Mesh(tp=2)

    def work(device_mesh: DeviceMesh) -> None:
        Layouts(mesh, 0).of(DTensor.from_local(torch.zeros(2), device_mesh["tp"], [Partial()]))

    with pytest.raises(AssertionError, match="holds partial sums"):
        as_rank(mesh, 0, work)
