"""regrow in torch's own API, in one process; real meshes are in tests/integration/checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.formats import Reading
from orchestrator.checkpoint.formats.native import open_files
from orchestrator.checkpoint.formats.torch_api import NativeWriter, UniversalReader
from orchestrator.checkpoint.store import committed, fence
from orchestrator.checkpoint.view import UniversalView
from tests.unit.checkpoint.formats.dcp_saving import assert_holds, contents, opened, read, save, trained

FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)
NESTED = StateDictOptions()


def load(state: dict[str, Any], reader: UniversalReader, partial: bool = False) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = dcp.DefaultLoadPlanner(allow_partial_load=partial)
        dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)


@pytest.fixture
def view(tmp_path: Path) -> UniversalView:
    weights, states = get_state_dict(*trained())
    return opened(save({"model": weights, "optim": states, "scheduler": {"last_epoch": 3}}, tmp_path / "source"))


@pytest.mark.parametrize("saved", [NESTED, FLATTENED], ids=["nested", "flattened"])
@pytest.mark.parametrize("loaded", [NESTED, FLATTENED], ids=["nested", "flattened"])
@pytest.mark.parametrize("keys", [("model", "optim"), ("model_state_dict", "opt"), ("net.model", "net.optimizer")])
def test_every_shape_of_state_dict_loads(
    tmp_path: Path, saved: StateDictOptions, loaded: StateDictOptions, keys: tuple[str, str]
) -> None:
    weights, states = get_state_dict(*trained(), options=saved)
    reader = UniversalReader(opened(save({"app": {"model": weights, "optim": states}}, tmp_path)))
    model, optimizer = trained(steps=3)
    weights, states = get_state_dict(model, optimizer, options=loaded)
    state = {keys[0]: weights, keys[1]: states}
    load(state, reader)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state[keys[1]], options=loaded)
    weights, states = get_state_dict(model, optimizer)
    assert_holds(reader.view, weights, states["state"])
    assert states["param_groups"] == get_state_dict(*trained())[1]["param_groups"]


def test_a_bare_model_is_rounded_to_the_dtype_it_trains_in(view: UniversalView) -> None:
    model = trained(steps=3)[0].to(torch.bfloat16)
    load(model.state_dict(), UniversalReader(view))
    for name, value in trained()[0].state_dict().items():
        found = model.state_dict()[name]
        assert torch.equal(found, value.to(found.dtype)), name


def test_parts_that_are_not_contiguous_are_filled(view: UniversalView) -> None:
    whole = torch.zeros(8, 6)
    load({"model": {"0.weight": whole.t()}}, UniversalReader(view))
    assert contents(whole.t()) == read(view, "0.weight")


def test_tied_names_are_both_filled(view: UniversalView) -> None:
    view.aliases["head.weight"] = "0.weight"
    state = {
        "model": {"head.weight": torch.zeros(6, 8)},
        "optim": {"state": {"head.weight": {"step": torch.zeros(())}}},
    }
    load(state, UniversalReader(view))
    assert contents(state["model"]["head.weight"]) == read(view, "0.weight")
    assert float(state["optim"]["state"]["head.weight"]["step"]) == 2  # type: ignore[call-overload]


def test_settings_follow_the_names_of_parameters_not_the_number_of_the_group(view: UniversalView) -> None:
    model = trained()[0]
    rest, decayed = ([one for one in model.parameters() if (one.ndim > 1) == wide] for wide in (False, True))
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": decayed}], lr=9.0, foreach=True)
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": states}
    load(state, UniversalReader(view))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state["optim"])
    found = [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert found == [(0.2, 0.0, 3), (0.2, 0.01, 2)]


def test_groups_that_were_apart_are_not_mixed(view: UniversalView) -> None:
    model = trained()[0]
    weights, states = get_state_dict(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(CheckpointException, match="several values of weight_decay"):
        load({"model": weights, "optim": states}, UniversalReader(view))


def test_settings_that_the_source_lacks_stay_but_not_the_decisive_ones(view: UniversalView) -> None:
    model, optimizer = trained(steps=3, foreach=True)
    for group in view.state["param_groups"]:
        del group["foreach"]
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": states}
    load(state, UniversalReader(view))
    assert [(group["foreach"], group["lr"]) for group in state["optim"]["param_groups"]] == [(True, 0.2), (True, 0.2)]
    del view.state["param_groups"][0]["lr"]
    with pytest.raises(CheckpointException, match=r"has no lr for 0.weight: leave param_groups out"):
        load(state, UniversalReader(view))


def test_a_missing_key_is_told_with_its_nearest(view: UniversalView) -> None:
    state = {"model": {"0.wieght": torch.zeros(6, 8), "2.weight": torch.zeros(3, 6)}}
    with pytest.raises(CheckpointException, match=r"has no model.0.wieght: the nearest names are 0.weight"):
        load(state, UniversalReader(view))
    load(state, UniversalReader(view, allow_partial_load=True), partial=True)
    assert contents(state["model"]["2.weight"]) == read(view, "2.weight")
    assert not state["model"]["0.wieght"].any()


def test_a_model_of_another_name_is_not_taken_for_the_model(view: UniversalView) -> None:
    state = {"ema": {"0.weight": torch.zeros(6, 8)}}
    with pytest.raises(CheckpointException, match=r"has no ema.0.weight"):
        load(state, UniversalReader(view))
    load(state, UniversalReader(view, model="ema"))
    assert contents(state["ema"]["0.weight"]) == read(view, "0.weight")


def test_numbered_optimizers_are_told_what_to_do(view: UniversalView) -> None:
    model, optimizer = trained()
    with pytest.raises(CheckpointException, match="load into get_optimizer_state_dict"):
        load({"model": model.state_dict(), "optim": optimizer.state_dict()}, UniversalReader(view))


def test_another_shape_or_kind_is_an_error(view: UniversalView) -> None:
    with pytest.raises(CheckpointException, match=r"Size mismatch"):
        load({"model": {"0.weight": torch.zeros(8, 6)}}, UniversalReader(view))
    with pytest.raises(CheckpointException, match=r"0.weight is F32 in the checkpoint but torch.int64"):
        load({"model": {"0.weight": torch.zeros(6, 8, dtype=torch.int64)}}, UniversalReader(view))


def test_everything_loads_without_a_model(view: UniversalView) -> None:
    """Into an empty dict, as `dcp_to_torch_save` does."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=UniversalReader(view), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    expected = get_state_dict(*trained())
    assert_holds(view, state["model"], state["optim"]["state"])
    assert state["optim"]["param_groups"] == expected[1]["param_groups"]
    assert state["scheduler"] == {"last_epoch": 3}


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("options", [NESTED, FLATTENED], ids=["nested", "flattened"])
def test_a_native_save_has_the_names_that_a_dcp_save_is_read_with(tmp_path: Path, options: StateDictOptions) -> None:
    weights, states = get_state_dict(*trained(), options=options)
    state = {"app": {"model": weights, "optim": states}, "scheduler": {"pair": (1, 2), "steps": [1, {"rate": 0.5}]}}
    save(state, tmp_path / "native", NativeWriter(tmp_path / "native", step=7))
    view = open_files(LocalFiles(tmp_path / "native"), Reading())
    other = opened(save(state, tmp_path / "dcp"))
    assert view.tensors.keys() == other.tensors.keys() and view.step == 7
    for name, tensor in view.tensors.items():
        assert read(view, name) == read(other, name)
        assert (tensor.kind, tensor.shape) == (other.tensors[name].kind, other.tensors[name].shape)
    order = sorted(view.state["param_groups"], key=lambda group: group["weight_decay"])
    assert order == sorted(other.state["param_groups"], key=lambda group: group["weight_decay"])
    assert view.state["scheduler"] == other.state["scheduler"] == {"pair": [1, 2], "steps": [1, {"rate": 0.5}]}


def test_a_newer_generation_fences_off_a_save(tmp_path: Path) -> None:
    fence(tmp_path, 3)
    state = {"model": {"w": torch.ones(3)}}
    with pytest.raises(CheckpointException, match="generation 2 may not write"):
        save(state, tmp_path, NativeWriter(tmp_path, step=1, generation=2))
    assert not committed(tmp_path)
    save(state, tmp_path, NativeWriter(tmp_path, step=1))
    assert [(one.step, one.generation) for one in committed(tmp_path)] == [(1, 3)]


def test_what_a_native_checkpoint_cannot_hold_is_told(tmp_path: Path) -> None:
    model, optimizer = trained()
    with pytest.raises(CheckpointException, match=r"loader.position is not JSON-able"):
        save({"loader": {"position": b"1"}}, tmp_path, NativeWriter(tmp_path, step=1))
    with pytest.raises(CheckpointException, match="save get_optimizer_state_dict"):
        state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
        save(state, tmp_path, NativeWriter(tmp_path, step=1))
    with pytest.raises(CheckpointException, match="complex128"):
        save({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path, NativeWriter(tmp_path, step=1))
    assert not committed(tmp_path)


def test_an_int_as_step_comes_back(tmp_path: Path) -> None:
    """Some optimizers count with plain numbers."""
    states = {"state": {"0.weight": {"step": 5, "exp_avg": torch.ones(2, 3)}}, "param_groups": []}
    state = {"model": nn.Sequential(nn.Linear(3, 2)).state_dict(), "optim": states}
    save(state, tmp_path, NativeWriter(tmp_path, step=1))
    state["optim"] = {"state": {"0.weight": {"step": 0, "exp_avg": torch.zeros(2, 3)}}}
    load(state, UniversalReader(tmp_path, source="native"))
    assert state["optim"]["state"]["0.weight"]["step"] == 5
    assert state["optim"]["state"]["0.weight"]["exp_avg"].all()
