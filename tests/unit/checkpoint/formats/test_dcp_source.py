"""Distributed checkpoints as torch itself writes them, in every shape of state dict."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

from orchestrator.core.errors import CheckpointError, CorruptCheckpoint
from tests.unit.checkpoint.formats.dcp_saving import assert_holds, contents, opened, read, save, trained

FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)


def nested(prefix: str, model: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
    """Both under keys as deep as `prefix` says; no prefix for a model whose keys are at the top."""
    if not prefix:
        return {**model, "optimizer": optimizer}
    state: dict[str, Any] = {"model": model, "optim": optimizer}
    for key in reversed(prefix.split(".")[:-1]):
        state = {key: state}
    return state


@pytest.mark.parametrize("prefix", ["", "model", "app.model", "trainer.state.model"])
@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("format", list(SerializationFormat))
def test_every_nesting_has_the_same_names(
    tmp_path: Path, prefix: str, flattened: bool, format: SerializationFormat
) -> None:
    model, optimizer = trained()
    weights, states = get_state_dict(model, optimizer)
    saved = get_state_dict(model, optimizer, options=FLATTENED)[1] if flattened else states
    writer = dcp.FileSystemWriter(tmp_path, serialization_format=format, thread_count=2)
    view = opened(save(nested(prefix, weights, saved), tmp_path, writer))
    assert_holds(view, weights, states["state"])
    assert view.step == 2 and not view.frozen and not view.aliases and not view.notes
    kinds = {name: view.tensors[name].kind for name in weights}
    buffers = {"table", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert {name for name, kind in kinds.items() if kind == "buffer"} == buffers
    assert json.loads(json.dumps(view.state)) == view.state
    found = {(group["lr"], group["weight_decay"], tuple(group["params"])) for group in view.state["param_groups"]}
    expected = {(group["lr"], group["weight_decay"], tuple(group["params"])) for group in states["param_groups"]}
    assert found == expected
    assert view.state["param_groups"][0]["betas"] == [0.9, 0.999]


def test_other_values_keep_their_keys_and_what_json_lacks_is_noted(tmp_path: Path) -> None:
    model, optimizer = trained()
    weights, states = get_state_dict(model, optimizer)
    state = {
        "model": weights,
        "optim": states,
        "scheduler": {"last_epoch": 3, "milestones": [1, {"rate": 0.5}], "pair": (1, 2)},
        "rng": torch.get_rng_state(),
        "loader": {"position": b"\0\1"},
        "epoch": 7,
    }
    view = opened(save(state, tmp_path))
    scheduler = {"last_epoch": 3, "milestones": [1, {"rate": 0.5}], "pair": [1, 2]}
    assert {key: view.state[key] for key in ("scheduler", "epoch")} == {"scheduler": scheduler, "epoch": 7}
    assert view.tensors["rng"].kind == "buffer" and read(view, "rng") == contents(state["rng"])
    assert view.notes == ("The value.loader.position is left out: it holds a bytes.",)


def test_frozen_and_tied_parameters_stay_tensors(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False), "fixed": nn.Linear(4, 4)})
    model["head"].weight = model["embed"].weight
    model["fixed"].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model["head"](model["fixed"](model["embed"](torch.tensor([1, 2])))).sum().backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    view = opened(save({"model": weights, "optim": states}, tmp_path))
    assert_holds(view, weights, states["state"])
    assert view.frozen == {"fixed.weight", "fixed.bias", "head.weight"}
    assert "head.weight" in view.notes[0] or "2 more" in view.notes[0]
    assert read(view, "head.weight") == read(view, "embed.weight")


def adversaries(*widths: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The state of models whose parameters have the same names, and that of their optimizers."""
    models = [nn.Sequential(nn.Linear(width, 3)) for width in widths]
    weights, states = [], []
    for model, width in zip(models, widths, strict=True):
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(2, width)).sum().backward()
        optimizer.step()
        mine = get_state_dict(model, optimizer)
        weights.append(mine[0])
        states.append(mine[1])
    return weights, states


def test_two_models_of_the_same_names_are_told_apart_by_shapes(tmp_path: Path) -> None:
    weights, states = adversaries(4, 5)
    saved = {"maker": weights[0], "judge": weights[1], "opt_judge": states[1], "opt_maker": states[0]}
    view = opened(save(saved, tmp_path))
    for name, own, mine in zip(("maker", "judge"), weights, states, strict=True):
        assert read(view, f"{name}.0.weight") == own["0.weight"].numpy().tobytes()
        moment = mine["state"]["0.weight"]["exp_avg"]
        assert read(view, f"{name}.0.weight.exp_avg") == moment.numpy().tobytes()


def test_two_models_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    weights, states = adversaries(4, 4)
    saved = {"maker": weights[0], "judge": weights[1], "opt_judge": states[1], "opt_maker": states[0]}
    with pytest.raises(CheckpointError, match="does not tell which of judge and maker the optimizer opt_judge trains"):
        opened(save(saved, tmp_path))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_optimizer_without_states_still_says_what_is_trained(tmp_path: Path, momentum: float) -> None:
    model, optimizer = trained(torch.optim.SGD, momentum=momentum)
    weights, states = get_state_dict(model, optimizer)
    view = opened(save({"model": weights, "optim": states}, tmp_path))
    assert view.step == 0 and not view.frozen
    assert sum(len(group["params"]) for group in view.state["param_groups"]) == len(list(model.parameters()))
    assert ("0.weight.momentum_buffer" in view.tensors) == bool(momentum)


def test_numbered_parameters_get_names_by_the_models_order(tmp_path: Path) -> None:
    model, optimizer = trained(groups=False)
    view = opened(save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path))
    states = get_state_dict(model, optimizer)[1]
    assert_holds(view, model.state_dict(), states["state"])
    assert view.state["param_groups"][0]["params"] == [name for name, _ in model.named_parameters()]
    assert "follow from the model's order" in view.notes[0]


def test_numbered_parameters_of_several_groups_are_an_error(tmp_path: Path) -> None:
    model, optimizer = trained(groups=True)
    save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path)
    with pytest.raises(CheckpointError, match=r"numbers the parameters.*save get_optimizer_state_dict"):
        opened(tmp_path)


def test_numbered_parameters_that_fit_in_two_ways_are_an_error(tmp_path: Path) -> None:
    """One of two equal layers is frozen: the state dict does not say which."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model[1].parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path)
    with pytest.raises(CheckpointError, match="does not tell their names"):
        opened(tmp_path)


def test_names_that_the_optimizer_was_given_are_used(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": named[2:]}, {"params": named[:1], "lr": 0.5}])
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    view = opened(save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path))
    assert [group["params"] for group in view.state["param_groups"]] == [["1.weight", "1.bias"], ["0.weight"]]
    assert view.frozen == {"0.bias"}
    assert read(view, "0.weight.exp_avg") == contents(optimizer.state[model[0].weight]["exp_avg"])


@pytest.mark.parametrize("state", ["nested", "flat"])
def test_a_model_alone_has_no_frozen_parameters(tmp_path: Path, state: str) -> None:
    weights = get_model_state_dict(trained()[0])
    view = opened(save({"model": weights} if state == "nested" else weights, tmp_path))
    assert_holds(view, weights, {})
    assert not view.frozen and view.step == 0 and "param_groups" not in view.state


def test_two_models_keep_their_prefixes(tmp_path: Path) -> None:
    """Of a generator and its critic, whose parameters have the same names."""
    first, second = trained(steps=2), trained(steps=3)
    state: dict[str, Any] = {}
    for name, pair in (("generator", first), ("critic", second)):
        weights, states = get_state_dict(*pair)
        state[name] = {"model": weights, "optim": states}
    view = opened(save(state, tmp_path))
    assert read(view, "critic.model.0.weight") == contents(state["critic"]["model"]["0.weight"])
    moment = state["generator"]["optim"]["state"]["0.weight"]["exp_avg"]
    assert read(view, "generator.model.0.weight.exp_avg") == contents(moment)
    assert view.step == 3
    assert view.state["param_groups"][2]["params"][0] == "critic.model.0.weight"


def test_the_average_of_a_model_is_not_the_model(tmp_path: Path) -> None:
    model, optimizer = trained()
    weights, states = get_state_dict(model, optimizer)
    average = {name: value + 1 for name, value in weights.items()}
    view = opened(save({"ema": average, "model": weights, "optim": states}, tmp_path))
    assert read(view, "0.weight") == contents(weights["0.weight"])
    assert view.tensors["ema.0.weight"].kind == "buffer"


def test_compiled_models_have_the_names_of_plain_ones(tmp_path: Path) -> None:
    model, optimizer = trained()
    states = get_state_dict(model, optimizer)[1]
    wrapped = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    assert_holds(opened(save({"model": wrapped, "optim": states}, tmp_path)), model.state_dict(), states["state"])


def test_shards_of_the_hugging_face_writer(tmp_path: Path) -> None:
    weights = get_model_state_dict(trained()[0])
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    view = opened(save(weights, tmp_path, writer))
    assert_holds(view, weights, {})
    assert "could not be noticed" in view.notes[0]


def test_metadata_of_each_rank_are_read_together(tmp_path: Path) -> None:
    """What `use_collectives=False` leaves: made here by renaming, as it takes a process group."""
    model, optimizer = trained()
    weights, states = get_state_dict(model, optimizer)
    save({"model": weights, "optim": states}, tmp_path)
    shutil.copy(tmp_path / ".metadata", tmp_path / "__1.metadata")
    (tmp_path / ".metadata").rename(tmp_path / "__0.metadata")
    view = opened(tmp_path)
    assert_holds(view, weights, states["state"])
    assert "metadata of 2 ranks" in view.notes[0]


def test_of_several_checkpoints_the_newest_or_the_one_that_is_named(tmp_path: Path) -> None:
    for step in (9, 10):
        model, optimizer = trained(steps=step)
        weights, states = get_state_dict(model, optimizer)
        save({"model": weights, "optim": states}, tmp_path / f"step-{step}")
    assert opened(tmp_path).step == 10
    assert opened(tmp_path, "9").step == opened(tmp_path, "step-9").step == 9
    with pytest.raises(CheckpointError, match="holds no checkpoint 8: choose one of step-10, step-9"):
        opened(tmp_path, "8")
    (tmp_path / "step-9").rename(tmp_path / "best")
    with pytest.raises(CheckpointError, match="several checkpoints"):
        opened(tmp_path)


def test_transformed_streams_are_refused_with_their_name(tmp_path: Path) -> None:
    from torch.distributed.checkpoint._extension import StreamTransformExtension

    class Reversed(StreamTransformExtension):
        @staticmethod
        def registry_name() -> str:
            return "stream.reversed"

        @staticmethod
        def from_descriptor(version: str) -> Reversed:
            return Reversed()

        def get_descriptor(self) -> str:
            return "stream.reversed/1"

        def transform_to(self, output: Any) -> Any:
            return output

        def transform_from(self, input: Any) -> Any:
            return input

    writer = dcp.FileSystemWriter(tmp_path, _extensions=[Reversed()])
    save({"model": {"w": torch.ones(3)}}, tmp_path, writer)
    with pytest.raises(CheckpointError, match=r"w is stored through stream.reversed/1: load it with torch"):
        opened(tmp_path)


def test_a_shortened_data_file_is_found_by_its_metadata(tmp_path: Path) -> None:
    save({"model": {"w": torch.ones(3)}}, tmp_path)
    data = tmp_path / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=r"__0_0.distcp is corrupt at tensor model.w"):
        opened(tmp_path)


def test_archives_of_one_shape_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.checkpoint import view as module

    parsed: list[int] = []
    original = module.open_blob
    monkeypatch.setattr(module, "open_blob", lambda *args: parsed.append(args[2]) or original(*args))
    weights = {f"w{index}": torch.full((3, 2), float(index)) for index in range(9)}
    weights |= {"half": torch.ones(3, 4, dtype=torch.float16), "turned": torch.arange(6.0).reshape(2, 3).t()}
    assert_holds(opened(save(weights, tmp_path)), weights, {})
    assert len(parsed) == 3


def test_a_damaged_archive_is_not_taken_for_one_of_its_shape(tmp_path: Path) -> None:
    weights = {f"w{index}": torch.full((3, 2), float(index)) for index in range(3)}
    view = opened(save(weights, tmp_path))
    last = view.tensors["w2"].chunks[0]
    with (tmp_path / "__0_0.distcp").open("r+b") as file:
        file.seek(last.begin + 1)
        file.write(b"X")
    read(view, "w0")
    with pytest.raises(CorruptCheckpoint, match="at tensor w2"):
        read(view, "w2")


def test_nothing_that_is_a_tensor_is_an_error(tmp_path: Path) -> None:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    save({"model": {"w": torch.ones(3)}}, tmp_path, planner=planner)
    with pytest.raises(CheckpointError, match="holds no tensors of its own: save with a planner that flattens"):
        opened(tmp_path)


def test_reading_does_not_import_torch(tmp_path: Path) -> None:
    """Its import takes longer than most conversions."""
    weights, states = get_state_dict(*trained())
    save({"model": weights, "optim": states}, tmp_path)
    program = (
        "import sys; from orchestrator.checkpoint.formats import open_checkpoint;"
        f"view = open_checkpoint({str(tmp_path)!r}, source='dcp'); assert view.step == 2 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
