"""Writing DeepSpeed's universal checkpoints: what torch reads of them, and what comes back."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.formats.deepspeed_sharding import sharding
from orchestrator.checkpoint.formats.deepspeed_universal_target import write_deepspeed_universal
from orchestrator.checkpoint.formats.torch_archive import Storage, archive
from orchestrator.checkpoint.formats.torch_pickle import Instance, Tensor
from orchestrator.checkpoint.stream import Limits, write_files
from orchestrator.checkpoint.verify import verify_any
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError, Conflict, CorruptCheckpoint, InvalidInput
from tests.unit.checkpoint.formats import universal_layout as layout
from tests.unit.checkpoint.samples import ARRAYS, contents, sample

STAGES = pytest.mark.parametrize("stage", [1, 2, 3])


def write(view: UniversalView, target: Path, stage: int) -> tuple[str, ...]:
    return write_deepspeed_universal(view, target, stage=stage, limits=Limits(1 << 20), progress=lambda count: None)


def load(file: Path) -> Any:
    with torch.serialization.safe_globals([torch.Size]):
        return torch.load(file, weights_only=True)


@pytest.mark.parametrize("source", [1, 3])
@STAGES
def test_any_stage_becomes_any_other(tmp_path: Path, source: int, stage: int) -> None:
    layout.write(tmp_path, stage=source, tag="source")
    view = open_checkpoint(tmp_path / "source")
    (tmp_path / "new").mkdir()
    assert all("IndexError" in note for note in write(view, tmp_path / "new" / "t", stage))
    again = open_checkpoint(tmp_path / "new")
    assert contents(again) == contents(view)
    assert {name: one.shape for name, one in again.tensors.items()} == {
        name: one.shape for name, one in view.tensors.items()
    }
    assert (again.step, again.frozen, again.aliases) == (view.step, view.frozen, view.aliases)
    assert again.training_dtypes == view.training_dtypes
    assert again.state == view.state | {"skipped_steps": 0}


@STAGES
def test_the_files_are_what_deepspeed_loads(tmp_path: Path, stage: int) -> None:
    layout.write(tmp_path, stage=1, tag="source")
    target = tmp_path / "target"
    write(open_checkpoint(tmp_path / "source"), target, stage)
    for name in layout.SHAPES:
        for state in layout.STATES:
            held = load(target / "zero" / name / f"{state}.pt")
            wanted = layout.expected()[name if state == "fp32" else f"{name}.{state}"]
            if stage < 3:
                assert held.keys() == {"cat_dim", "param"} and held["cat_dim"] == 0
                assert torch.equal(held["param"], wanted)
            else:
                assert torch.equal(held, wanted.flatten())
        step = target / "zero" / name / "step.pt"
        assert step.exists() == (stage < 3)
        if stage < 3:
            assert torch.equal(load(step), torch.tensor(7.0))
    assert (tmp_path / "latest_universal").read_text() == "target"
    optimizer = load(target / "zero" / "optimizer_state.pt")
    groups = [{**group, "params": [index]} for index, group in enumerate(layout.HYPER)]
    assert optimizer["param_groups"] == groups and optimizer["ds_version"] == "0.19.8"
    if stage == 3:
        inner = optimizer["optimizer_state_dict"]
        assert torch.equal(inner["state"][0]["step"], torch.tensor(7.0))
        # What DeepSpeed would give to all groups is only what they have in common.
        assert inner["param_groups"] == [{"betas": (0.9, 0.95), "params": [0]}]


@STAGES
def test_the_model_file_has_what_deepspeed_and_a_plain_load_need(tmp_path: Path, stage: int) -> None:
    layout.write(tmp_path, stage=1, tag="source")
    write(open_checkpoint(tmp_path / "source"), tmp_path / "target", stage)
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    (file,) = (tmp_path / "target").glob("*model_states.pt")
    assert file.name == f"{prefix}mp_rank_00_model_states.pt"
    model = load(file)
    for key in ("global_steps", "skipped_steps", "dp_world_size", "mp_world_size", "ds_version"):
        assert key in model
    assert model["global_steps"] == 7 and model["lr_scheduler"] == {"last_epoch": 7} and model["iteration"] == 7
    assert model["param_shapes"] == [
        {name: torch.Size(layout.SHAPES[name]) for name in group} for group in layout.GROUPS
    ]
    module = model["module"]
    for name, tensor in layout.frozen().items():
        assert torch.equal(module[name], tensor)
        assert torch.equal(model["frozen_param_fragments"][name].flatten(), tensor.flatten())
    assert torch.equal(module["running"], torch.arange(6.0)) and model["buffer_names"] == ["running"]
    if stage == 3:
        assert module.keys() == {*layout.FROZEN, "running"}
    else:
        for name in layout.SHAPES:
            assert torch.equal(module[name], layout.expected()[name].bfloat16())
        assert module["tied.weight"].data_ptr() == module["embed.weight"].data_ptr()


@STAGES
def test_every_byte_is_under_a_checksum(tmp_path: Path, stage: int) -> None:
    layout.write(tmp_path, stage=1, tag="source")
    write(open_checkpoint(tmp_path / "source"), tmp_path / "target", stage)
    for file in (tmp_path / "target").rglob("*.pt"):
        assert zipfile.ZipFile(file).testzip() is None
    assert verify_any(tmp_path / "target").unproven == 0
    damaged = tmp_path / "target" / "zero" / "lift" / "exp_avg.pt"
    data = bytearray(damaged.read_bytes())
    data[data.index(layout.expected()["lift.exp_avg"].numpy().tobytes())] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"lift/exp_avg\.pt is corrupt"):
        verify_any(tmp_path / "target")


def test_tied_names_are_links_to_the_master(tmp_path: Path) -> None:
    layout.write(tmp_path, stage=1, tag="source")
    write(open_checkpoint(tmp_path / "source"), tmp_path / "target", 1)
    zero = tmp_path / "target" / "zero"
    for state in (*layout.STATES, "step"):
        assert (zero / "tied.weight" / f"{state}.pt").samefile(zero / "embed.weight" / f"{state}.pt")


def test_links_are_copies_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    layout.write(tmp_path, stage=1, tag="source")
    write(open_checkpoint(tmp_path / "source"), tmp_path / "target", 1)
    zero = tmp_path / "target" / "zero"
    assert (zero / "tied.weight" / "fp32.pt").read_bytes() == (zero / "embed.weight" / "fp32.pt").read_bytes()


def test_a_parameter_that_was_never_used_gets_zero_moments(tmp_path: Path) -> None:
    view = sample(tmp_path / "source")
    notes = write(view, tmp_path / "target", 3)
    assert torch.equal(load(tmp_path / "target/zero/embedding/exp_avg.pt"), torch.zeros(30))
    assert torch.equal(
        load(tmp_path / "target/zero/embedding/fp32.pt"), torch.from_numpy(ARRAYS["embedding"]).float().flatten()
    )
    assert torch.equal(load(tmp_path / "target/zero/layers.0.weight/exp_avg.pt")[:11], torch.from_numpy(
        ARRAYS["layers.0.weight.exp_avg"][0]))  # fmt: skip
    assert any("embedding" in note and "rounded" in note for note in notes)
    assert not (tmp_path / "target/zero/nothing").exists() and not (tmp_path / "target/zero/frozen").exists()


def test_one_step_for_a_group(tmp_path: Path) -> None:
    arrays = {f"{name}.weight{state}": np.ones((2, 2), "f4") for name in "ab" for state in ("", ".exp_avg")}
    arrays |= {"a.weight.step": np.array(3, "f4"), "b.weight.step": np.array(5, "f4")}
    view = sample(tmp_path / "source", arrays)
    for name, tensor in view.tensors.items():
        if name.endswith("exp_avg"):
            view.tensors[name] = replace(tensor, parameter=name[:8], state="exp_avg", kind="state")
    view.state["param_groups"] = [{"lr": 1.0, "params": ["a.weight", "b.weight"]}]
    notes = write(view, tmp_path / "target", 1)
    assert load(tmp_path / "target/zero/a.weight/step.pt").item() == 5
    assert any("a.weight" in note and "get step 5 instead of 3" in note for note in notes)


@pytest.mark.parametrize(("count", "ranks"), [(1, 2), (6, 4), (31, 5), (10**6, None)])
def test_groups_that_deepspeed_could_not_load_are_noted(tmp_path: Path, count: int, ranks: int | None) -> None:
    view = sample(tmp_path / "source", {"only": np.zeros(count, "f4")})
    view.state["param_groups"] = [{"lr": 1.0, "params": ["only"]}]
    notes = write(view, tmp_path / "target", 2)
    words = f"Parameter group 0 has {count} elements: on {ranks} ranks, where one holds none of them"
    assert [note.startswith(words) for note in notes] == ([True] if ranks else [])
    (note,) = write(view, tmp_path / "other", 3)
    assert note.startswith("The source has no optimizer state")


def test_states_that_zero_3_does_not_load_are_refused(tmp_path: Path) -> None:
    view = sample(tmp_path / "source")
    moment = view.tensors.pop("layers.0.weight.exp_avg")
    name = "layers.0.weight.momentum_buffer"
    view.tensors[name] = replace(moment, name=name, state="momentum_buffer")
    with pytest.raises(CheckpointError, match="under ZeRO 3, but the source has momentum_buffer: write it for stage 1"):
        write(view, tmp_path / "target", 3)
    assert not (tmp_path / "target").exists() and not (tmp_path / "latest_universal").exists()
    write(view, tmp_path / "target", 2)
    assert (tmp_path / "target/zero/layers.0.weight/momentum_buffer.pt").exists()


@pytest.mark.parametrize("name", ["../out", "a/b", "..", "x" * 256])
def test_names_that_are_no_folder_names_are_refused(tmp_path: Path, name: str) -> None:
    view = sample(tmp_path / "source")
    view.tensors[name] = replace(view.tensors["embedding"], name=name, parameter=name)
    with pytest.raises(CheckpointError, match="cannot have a folder of its name"):
        write(view, tmp_path / "target", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_cannot_be_read_leaves_no_target(tmp_path: Path) -> None:
    view = sample(tmp_path / "source")
    (tmp_path / "source" / "raw").write_bytes(b"short")
    with pytest.raises(CorruptCheckpoint):
        write(view, tmp_path / "target", 1)
    assert not (tmp_path / "target").exists() and not (tmp_path / "latest_universal").exists()


def test_an_existing_target_and_another_stage_are_refused(tmp_path: Path) -> None:
    view = sample(tmp_path / "source")
    with pytest.raises(InvalidInput, match="0 is not a ZeRO stage"):
        write(view, tmp_path / "target", 0)
    (tmp_path / "target").mkdir()
    with pytest.raises(Conflict, match="exists already"):
        write(view, tmp_path / "target", 1)


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    view = sample(tmp_path / "source")
    raw = (tmp_path / "source" / "raw").read_bytes()
    done: list[int] = []

    def stop(count: int) -> None:
        done.append(count)
        if sum(done) > 2000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_deepspeed_universal(view, tmp_path / "target", stage=1, limits=Limits(workers=1), progress=stop)
    assert (tmp_path / ".target.partial").exists() and not (tmp_path / "target").exists()
    counts: list[int] = []
    write_deepspeed_universal(view, tmp_path / "target", stage=1, limits=Limits(workers=1), progress=counts.append)
    assert counts[0] > 0 and not (tmp_path / ".target.partial").exists()
    write(view, tmp_path / "fresh", 1)
    assert contents(open_checkpoint(tmp_path / "target")) == contents(open_checkpoint(tmp_path / "fresh"))
    assert raw == (tmp_path / "source" / "raw").read_bytes()


def test_the_dynamic_loss_scaler_comes_back_whole(tmp_path: Path) -> None:
    view = sample(tmp_path / "source")
    scaler = {
        "cur_scale": 256.0, "dynamic": True, "cur_iter": 3, "last_overflow_iter": -1, "scale_factor": 2.0,
        "scale_window": 1000, "min_scale": 1, "delayed_shift": 2, "cur_hysteresis": 2,
        "consecutive_hysteresis": False, "raise_error_at_min_scale": True,
    }  # fmt: skip
    view.state |= {"loss_scaler": scaler, "dynamic_loss_scale": True}
    write(view, tmp_path / "target", 1)
    data = (tmp_path / "target/zero/optimizer_state.pt").read_bytes()
    assert b"cdeepspeed.runtime.fp16.loss_scaler\nDynamicLossScaler\n" in data and b"ctorch\nfloat16\n" in data
    assert open_checkpoint(tmp_path / "target").state["loss_scaler"] == scaler | {"dtype": None}
    view.state["loss_scaler"] = {"dynamic": True, "cur_scale": 3.0}
    assert any("loss scaler" in note for note in write(view, tmp_path / "other", 1))


def test_numbered_keys_are_numbers_again(tmp_path: Path) -> None:
    view = sample(tmp_path / "source")
    view.state["lr_scheduler"] = json.loads(json.dumps({"milestones": {30: 1, 60: 2}, "last_epoch": 4, "x": [{1: 2}]}))
    write(view, tmp_path / "target", 1)
    model = load(tmp_path / "target/mp_rank_00_model_states.pt")
    assert model["lr_scheduler"] == {"milestones": {30: 1, 60: 2}, "last_epoch": 4, "x": [{1: 2}]}


INFO = {
    "universal_checkpoint_version": 0.4,
    "tp_replicated_parameter_patterns": [r".*norm.*"],
    "parameter_with_2_sub_params_cat_dim_0": [r".*swiglu.*"],
    "parameter_with_row_parallelism_patterns": [r".*down\.weight"],
    "parameter_with_sub_params": [{"patterns": [r".*qkv.*"], "shape": [[8, 4, 4], 16], "partition_dim": 0}],
    "vocabulary_parameter_patterns": [r"embed.*"],
}


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("norm.weight", {}),
        ("swiglu.weight", {"cat_dim": 0, "param_n_sub_params": 2}),
        ("x.down.weight", {"cat_dim": 1}),
        ("x.up.weight", {"cat_dim": 0}),
        ("embed.weight", {"cat_dim": 0, "vocab_tensor": True}),
    ],
)
def test_how_tensor_parallel_ranks_cut_is_said_again(name: str, members: dict[str, Any]) -> None:
    assert sharding(INFO, name, (16, 8)) == members
    assert sharding(None, name, (16, 8)) == {"cat_dim": 0}


def test_fused_tensors_say_their_sections() -> None:
    found = sharding(INFO, "x.qkv.weight", (16, 16))["sub_param_shape"]
    assert isinstance(found, Instance) and str(found.name).endswith("universal_checkpoint.SubparamShape")
    assert found.attributes == {"patterns": [r".*qkv.*"], "shape": ((8, 4, 4), 16), "partition_dim": 0}


def test_before_version_04_a_number_stood_for_equal_sections() -> None:
    fused = {"patterns": [r"qkv"], "shape": [3, -1], "partition_dim": 0}
    info = {"universal_checkpoint_version": 0.3, "parameter_with_sub_params": [fused]}
    assert sharding(info, "qkv", (12, 4))["sub_param_shape"].attributes["shape"] == ((4, 4, 4), -1)
    with pytest.raises(CheckpointError, match="no 3 equal sections"):
        sharding(info, "qkv", (13, 4))
    fused["partition_dim"] = 2
    with pytest.raises(CheckpointError, match="does not say how qkv of shape"):
        sharding(info, "qkv", (12, 4))


@pytest.mark.parametrize("pattern", [3, "(", "(a*)*b"])
def test_patterns_that_are_none(pattern: Any) -> None:
    with pytest.raises(CheckpointError, match=r"universal_checkpoint_info|pattern"):
        sharding({"vocabulary_parameter_patterns": [pattern]}, "a" * 40, (2,))


@pytest.mark.parametrize("dtype", ["uint16", "float8_e4m3fn", "int64", "bool", "complex64"])
def test_archives_of_any_dtype(tmp_path: Path, dtype: str) -> None:
    wanted = torch.arange(6).view(torch.uint8)[:8].view(getattr(torch, dtype))
    names = {"uint16": "U16", "float8_e4m3fn": "F8_E4M3", "int64": "I64", "bool": "BOOL", "complex64": "C64"}
    kind = names[dtype]
    file = archive("f.pt", [Tensor(0, kind, tuple(wanted.shape)), -1, 2**80, None, "é", {}, []], [
        Storage(kind, tuple(wanted.shape), data=wanted.view(torch.uint8).numpy().tobytes())])  # fmt: skip
    write_files(None, tmp_path, [file.output], limits=Limits(), progress=print, done={}, record=print)  # type: ignore[arg-type]
    found = torch.load(tmp_path / "f.pt", weights_only=True)
    assert found[0].dtype == wanted.dtype and torch.equal(found[0].view(torch.uint8), wanted.view(torch.uint8))
    assert found[1:] == [-1, 2**80, None, "é", {}, []]


def test_archives_of_more_than_four_gigabytes(tmp_path: Path) -> None:
    large = (1 << 30, 4)  # 16 GiB of zeros that take no room
    storages = [Storage("F32", large), Storage("F32", (2,), data=np.array([3, 4], "f4").tobytes())]
    file = archive("f.pt", {"large": Tensor(0, "F32", large), "small": Tensor(1, "F32", (2,))}, storages)
    write_files(None, tmp_path, [file.output], limits=Limits(), progress=print, done={}, record=print)  # type: ignore[arg-type]
    found = torch.load(tmp_path / "f.pt", weights_only=True, mmap=True)
    assert found["large"].shape == large and found["large"][-1, -1] == 0
    assert found["small"].tolist() == [3, 4]
