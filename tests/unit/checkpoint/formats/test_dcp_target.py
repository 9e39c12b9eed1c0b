"""Any view as a distributed checkpoint: stock torch loads it, and it never looks whole before it is."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from orchestrator.checkpoint.formats import dcp_target
from orchestrator.checkpoint.formats.dcp_target import torch_dtype, write_dcp
from orchestrator.checkpoint.formats.torch_blob import ALIGNMENT, tensor_blob
from orchestrator.checkpoint.layout import ITEM_BYTES, Box
from orchestrator.checkpoint.stream import Limits, cut
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError, Conflict
from tests.unit.checkpoint.formats.dcp_saving import assert_holds, contents, opened, read, save, trained

LIMITS = Limits(memory_bytes=1 << 20)


def silent(count: int) -> None:
    """Nobody looks."""


def load(state: dict[str, Any], directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=directory, no_dist=True)


@pytest.fixture
def view(tmp_path: Path) -> UniversalView:
    weights, states = get_state_dict(*trained())
    state = {"app": {"model": weights, "optim": states}, "scheduler": {"last_epoch": 3, "steps": [1, {"rate": 0.5}]}}
    return opened(save(state, tmp_path / "source"))


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("mmap", [False, True])
def test_the_bytes_around_a_tensor_are_those_of_torch(tmp_path: Path, dtype: str, mmap: bool) -> None:
    for shape in ((), (3,), (2, 5), (0, 4), (1, 2, 3)):
        data = os.urandom(math.prod(shape) * ITEM_BYTES[dtype])
        data = bytes(one & 1 for one in data) if dtype == "BOOL" else data
        before, after = tensor_blob(dtype, shape)
        assert len(before) % ALIGNMENT == 0
        (tmp_path / "tensor.pt").write_bytes(before + data + after)
        tensor = torch.load(tmp_path / "tensor.pt", weights_only=True, mmap=mmap)
        assert tensor.dtype == torch_dtype(dtype) and tuple(tensor.shape) == shape and tensor.is_contiguous()
        assert contents(tensor) == data


def test_torch_loads_weights_moments_steps_and_settings(tmp_path: Path, view: UniversalView) -> None:
    done: list[int] = []
    write_dcp(view, tmp_path / "target", limits=LIMITS, progress=done.append)
    assert sum(done) == sum(tensor.size_bytes for tensor in view.tensors.values())
    model, optimizer = trained(steps=3)
    weights, states = get_state_dict(model, optimizer)
    scheduler = {"last_epoch": 0, "steps": [0, {"rate": 0.0}]}
    state = {"model": weights, "optim": states, "scheduler": scheduler}
    load(state, tmp_path / "target")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state["optim"])
    expected_weights, expected_states = get_state_dict(*trained())
    weights, states = get_state_dict(model, optimizer)
    assert_holds(view, weights, states["state"])
    assert states["param_groups"] == expected_states["param_groups"]
    assert expected_weights.keys() == weights.keys()
    assert state["scheduler"] == view.state["scheduler"]


def test_settings_that_only_torch_knows_are_added(tmp_path: Path, view: UniversalView) -> None:
    """Of a source that another framework wrote, or that keeps no empty values."""
    model, optimizer = trained(steps=3)
    for group in view.state["param_groups"]:
        for key in (*dcp_target.NEUTRAL, "amsgrad"):
            del group[key]
    write_dcp(view, tmp_path / "target", limits=LIMITS, progress=silent)
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": states}
    load(state, tmp_path / "target")
    assert state["optim"]["param_groups"] == get_state_dict(*trained())[1]["param_groups"]


def test_it_reads_back_as_the_same_view(tmp_path: Path, view: UniversalView, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small chunks over several files."""
    monkeypatch.setattr(dcp_target, "CHUNK_BYTES", 64)
    monkeypatch.setattr(dcp_target, "FILE_BYTES", 20_000)
    write_dcp(view, tmp_path / "target", limits=LIMITS, progress=silent)
    back = opened(tmp_path / "target")
    assert len(back.tensors["0.weight"].chunks) == 3 and len(list((tmp_path / "target").glob("*.distcp"))) == 3
    assert back.tensors.keys() == view.tensors.keys()
    for name in view.tensors:
        assert read(back, name) == read(view, name)
    assert (back.state, back.step, back.frozen) == (view.state, view.step, view.frozen)


def test_tied_names_are_all_written(tmp_path: Path, view: UniversalView) -> None:
    view.aliases["head.weight"] = "0.weight"
    write_dcp(view, tmp_path / "target", limits=LIMITS, progress=silent)
    state = {"model": {"head.weight": torch.zeros(6, 8), "0.weight": torch.zeros(6, 8)}}
    load(state, tmp_path / "target")
    assert contents(state["model"]["head.weight"]) == contents(state["model"]["0.weight"]) == read(view, "0.weight")


def test_nothing_is_there_until_it_is_whole_and_a_second_attempt_goes_on(tmp_path: Path, view: UniversalView) -> None:
    class Killed(Exception):
        pass

    def stop(count: int) -> None:
        if count > 100:
            raise Killed

    target = tmp_path / "target"
    with pytest.raises(Killed):
        write_dcp(view, target, limits=LIMITS, progress=stop)
    assert not target.exists()
    write_dcp(view, target, limits=LIMITS, progress=silent)
    assert opened(target).tensors.keys() == view.tensors.keys()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(Conflict):
        write_dcp(view, target, limits=LIMITS, progress=silent)


def test_entries_of_one_key_are_an_error(tmp_path: Path, view: UniversalView) -> None:
    view.state["model"] = {"0.weight": 1}
    with pytest.raises(CheckpointError, match=r"two entries would both be model\.0\.weight"):
        write_dcp(view, tmp_path / "target", limits=LIMITS, progress=silent)


def test_large_tensors_are_cut_by_rows(view: UniversalView) -> None:
    shape = (3 << 20, 1 << 10)
    chunks = cut("0.weight", Box.whole(shape), "F32", 0, dcp_target.CHUNK_BYTES)
    assert {chunk.size_bytes for chunk in chunks} == {dcp_target.CHUNK_BYTES}
    assert all(chunk.box.sizes[1] == shape[1] for chunk in chunks)
