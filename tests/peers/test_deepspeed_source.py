"""Every checkpoint that real DeepSpeed saved, read back bit for bit: against the live state of its run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.reshard import flaw
from orchestrator.checkpoint.view import UniversalView
from tests.peers import data
from tests.peers.cases import RUNS, launches

pytestmark = [pytest.mark.peer, pytest.mark.timeout(3600)]

INFERRED = ("z0-fp32-w2-frozen",)
"""Without ZeRO the optimizer numbers its parameters; here a frozen one has the shape of its trained neighbours."""
WITHOUT_GROUPS = "elastic_checkpoint"
"""DeepSpeed saves no hyper-parameters with it (its BF16 optimizer ignores the setting)."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "F64": torch.float64}


def tensor_of(view: UniversalView, name: str) -> torch.Tensor:
    found = view.tensors[name]
    out = torch.empty(found.shape, dtype=DTYPES[found.dtype])
    view.read(name, Box.whole(found.shape), out.reshape(-1).view(torch.uint8).numpy())
    return out


def expected(live: dict[str, torch.Tensor], scalars: dict[str, dict[str, float]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the view, by name, as the live state has them."""
    for key, tensor in live.items():
        what, _, name = key.partition("/")
        if what == "state":
            state, _, parameter = name.partition("/")
            yield f"{parameter}.{state}", tensor
        elif what != "weight":
            yield name, tensor
    for state, numbers in scalars.items():
        for parameter, number in numbers.items():
            yield f"{parameter}.{state}", torch.tensor(number)


def assert_same_tensors(view: UniversalView, live: dict[str, torch.Tensor], known: dict[str, Any]) -> None:
    due = dict(expected(live, known["scalars"]))
    assert set(view.tensors) == set(due)
    for name, tensor in due.items():
        found = tensor_of(view, name)
        assert found.shape == tensor.shape, name
        if view.tensors[name].state == "step" or name.rpartition(".")[2] in known["scalars"]:
            assert float(found) == float(tensor), name
        else:
            assert found.dtype == tensor.dtype, name
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
        assert flaw(tuple(found.shape), [chunk.box for chunk in view.tensors[name].chunks]) is None, name


def assert_same_weights(view: UniversalView, live: dict[str, torch.Tensor], averaged: list[str]) -> None:
    """The trained weights follow from the masters, also those of tied names."""
    for key, weight in live.items():
        what, _, alias = key.partition("/")
        if what == "weight" and alias not in averaged:
            name = view.aliases.get(alias, alias)
            dtype = view.training_dtypes.get(name, view.tensors[name].dtype)
            assert DTYPES[dtype] == weight.dtype, name
            assert torch.equal(tensor_of(view, name).to(weight.dtype), weight), name


def assert_same_groups(view: UniversalView, groups: list[dict[str, Any]], with_hyper: bool) -> None:
    found = view.state["param_groups"]
    assert [sorted(group["params"]) for group in found] == [sorted(group["names"]) for group in groups]
    for group, due in zip(found, groups, strict=True):
        if with_hyper:
            assert {key: group[key] for key in due["hyper"]} == due["hyper"]
    assert with_hyper or "does not hold the hyper-parameters" in " ".join(view.notes)


@pytest.mark.parametrize("launch", launches())
def test_what_was_live_is_read_back(launch: str) -> None:
    for run in launches()[launch]:
        made = data.checkpoint(run.name)
        live, known = made.live(), made.known()
        view = open_checkpoint(made.root, source="deepspeed")
        assert view.source == f"deepspeed zero {run.stage}", run.name
        assert view.step == known["global_steps"], run.name
        assert view.aliases == known["aliases"], run.name
        assert view.frozen == {key.removeprefix("frozen/") for key in live if key.startswith("frozen/")}, run.name
        buffers = {key.removeprefix("buffer/") for key in live if key.startswith("buffer/")}
        assert {name for name, one in view.tensors.items() if one.kind == "buffer"} == buffers, run.name
        assert_same_tensors(view, live, known)
        assert_same_weights(view, live, known.get("averaged", []))
        saves_groups = not run.zero.get(WITHOUT_GROUPS) or known["optimizer"] == "BF16_Optimizer"
        assert_same_groups(view, known["groups"], saves_groups)
        kept = {key: value for key, value in known["client_state"].items() if key != "universal_checkpoint_info"}
        assert {key: view.state.get(key) for key in kept} == kept, run.name
        assert view.state["skipped_steps"] == known["skipped_steps"], run.name
        assert ("lr_scheduler" in view.state) == run.scheduler, run.name
        assert any("trained as a whole" in note for note in view.notes) == (run.name in INFERRED), run.name


@pytest.mark.parametrize("name", [name for name in RUNS if name.endswith("-all")])
def test_building_the_view_reads_no_tensor(name: str) -> None:
    """A few bytes per rank and group beside the metadata: the optimizer's steps."""
    made = data.checkpoint(name)
    view = open_checkpoint(made.directory)
    metadata = view.files.bytes_read  # type: ignore[attr-defined]
    stored = sum(file.stat().st_size for file in made.directory.iterdir())
    assert metadata < stored
    before = view.files.bytes_read  # type: ignore[attr-defined]
    tensor_of(view, "embed.weight")
    assert view.files.bytes_read - before == view.tensors["embed.weight"].size_bytes  # type: ignore[attr-defined]
