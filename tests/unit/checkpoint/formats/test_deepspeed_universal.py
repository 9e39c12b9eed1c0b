"""Reading DeepSpeed's universal checkpoints, from files in its layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.formats import deepspeed_universal, open_checkpoint, recognise
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.verify import prove
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint
from tests.unit.checkpoint.formats import universal_layout as layout

STAGES = pytest.mark.parametrize("stage", [1, 2, 3])
LAYOUTS = pytest.mark.parametrize("stage", [1, 3])


def value(view: UniversalView, name: str) -> torch.Tensor:
    tensor = view.tensors[name]
    out = np.zeros(tensor.size_bytes, np.uint8)
    view.read(name, Box.whole(tensor.shape), out)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[tensor.dtype]
    return torch.from_numpy(out).view(dtype).reshape(tensor.shape)


@STAGES
def test_values_and_moments_are_those_saved(tmp_path: Path, stage: int) -> None:
    layout.write(tmp_path, stage=stage)
    view = open_checkpoint(tmp_path)
    prove(view)
    for name, tensor in layout.expected().items():
        assert torch.equal(value(view, name), tensor), name
    for name in layout.SHAPES:
        assert value(view, f"{name}.step").item() == layout.STEP
    assert view.source == "deepspeed universal" and view.step == layout.STEP


@STAGES
def test_what_is_not_trained_comes_from_the_module(tmp_path: Path, stage: int) -> None:
    layout.write(tmp_path, stage=stage)
    view = open_checkpoint(tmp_path)
    assert view.frozen == set(layout.FROZEN)
    for name, tensor in layout.frozen().items():
        assert torch.equal(value(view, name), tensor), name
    assert view.tensors["running"].kind == "buffer"
    assert torch.equal(value(view, "running"), torch.arange(6.0))
    assert view.aliases == {"tied.weight": "embed.weight"}
    assert "tied.weight" not in view.tensors
    assert set(view.tensors) == {
        *layout.expected(), *(f"{name}.step" for name in layout.SHAPES), *layout.FROZEN, "running"
    }  # fmt: skip


@STAGES
def test_groups_dtypes_and_state(tmp_path: Path, stage: int) -> None:
    layout.write(tmp_path, stage=stage)
    view = open_checkpoint(tmp_path)
    groups = view.state["param_groups"]
    assert [group["params"] for group in groups] == layout.GROUPS
    assert [group["lr"] for group in groups] == [0.1, 0.2] and groups[0]["betas"] == [0.9, 0.95]
    assert view.training_dtypes == dict.fromkeys(layout.SHAPES, "BF16")
    assert view.state["lr_scheduler"] == {"last_epoch": layout.STEP} and view.state["iteration"] == layout.STEP


@STAGES
def test_only_a_few_files_are_opened_before_a_tensor_is_read(
    tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout.write(tmp_path, stage=stage)
    opened: list[str] = []
    read = LocalFiles.read_into

    def noting(self: LocalFiles, file: str, begin: int, target: memoryview) -> None:
        opened.append(file)
        read(self, file, begin, target)

    monkeypatch.setattr(LocalFiles, "read_into", noting)
    view = open_checkpoint(tmp_path)
    tensors = {file for file in opened if "/zero/" in file and "optimizer_state" not in file}
    assert len(tensors) == (3 if stage == 3 else 4)  # the first of each state
    value(view, "lift")
    assert "step7_universal/zero/lift/fp32.pt" in opened


def test_the_folder_itself_and_one_by_its_tag(tmp_path: Path) -> None:
    layout.write(tmp_path, stage=1, tag="old")
    folder = layout.write(tmp_path, stage=3, tag="new")
    assert open_checkpoint(folder).tensors.keys() == open_checkpoint(tmp_path).tensors.keys()
    assert open_checkpoint(tmp_path, tag="old").tensors["lift"].chunks[0].file == "old/zero/lift/fp32.pt"
    with pytest.raises(CheckpointError, match=r"holds no universal checkpoint older: choose one of new, old"):
        open_checkpoint(tmp_path, tag="older")
    with pytest.raises(CheckpointError, match="is the universal checkpoint new, not old"):
        open_checkpoint(folder, tag="old")
    (tmp_path / "latest_universal").unlink()
    with pytest.raises(CheckpointError, match=r"no file latest_universal .* choose one of new, old"):
        open_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "old")
    assert open_checkpoint(tmp_path).tensors["lift"].chunks[0].file == "new/zero/lift/fp32.pt"


def test_deepspeeds_own_checkpoint_beside_it_comes_first(tmp_path: Path) -> None:
    layout.write(tmp_path, stage=1)
    assert recognise(LocalFiles(tmp_path)) is deepspeed_universal
    (tmp_path / "step7").mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (tmp_path / "step7" / name).write_bytes(b"")
    (tmp_path / "latest").write_text("step7")
    assert not deepspeed_universal.recognise(LocalFiles(tmp_path))


def test_shapes_of_tensor_parallel_pieces_are_not_those_of_the_tensors(tmp_path: Path) -> None:
    folder = layout.write(tmp_path, stage=1)
    file = folder / "mp_rank_00_model_states.pt"
    model = torch.load(file, weights_only=True)
    model["module"] = None
    for group in model["param_shapes"]:
        for name in group:
            group[name] = torch.Size((1, *group[name][1:]))
    for rank in (0, 1):
        torch.save(model, folder / f"mp_rank_0{rank}_model_states.pt")
    shutil.rmtree(folder / "zero" / "running")
    view = open_checkpoint(tmp_path)
    for name, tensor in layout.expected().items():
        assert torch.equal(value(view, name), tensor), name
    names = (*layout.SHAPES, *layout.FROZEN, "tied.weight")  # without a module nobody says what is not trained
    assert view.training_dtypes == dict.fromkeys(names, "BF16")


def test_a_folder_that_no_model_file_knows(tmp_path: Path) -> None:
    folder = layout.write(tmp_path, stage=2)
    (folder / "zero" / "more").mkdir()
    torch.save({"param": torch.ones(2, 3)}, folder / "zero" / "more" / "fp32.pt")
    assert torch.equal(value(open_checkpoint(tmp_path), "more"), torch.ones(2, 3))


def test_the_step_may_be_a_plain_number(tmp_path: Path) -> None:
    folder = layout.write(tmp_path, stage=1)
    for name in layout.SHAPES:
        torch.save(layout.STEP, folder / "zero" / name / "step.pt")
    view = open_checkpoint(tmp_path)
    assert value(view, "lift.step").item() == layout.STEP


@LAYOUTS
@pytest.mark.parametrize("name", ["fp32", "exp_avg_sq"])
def test_a_missing_file_is_named(tmp_path: Path, stage: int, name: str) -> None:
    folder = layout.write(tmp_path, stage=stage)
    (folder / "zero" / "lift" / f"{name}.pt").unlink()
    with pytest.raises(CorruptCheckpoint, match=rf"zero/lift/{name}\.pt is corrupt at tensor lift: it is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["zero/optimizer_state.pt", "mp_rank_00_model_states.pt"])
def test_a_missing_file_of_all_is_named(tmp_path: Path, file: str) -> None:
    folder = layout.write(tmp_path, stage=1)
    (folder / file).write_bytes(b"")
    with pytest.raises(CorruptCheckpoint, match=file):
        open_checkpoint(tmp_path)
    (folder / file).unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{file} is corrupt: it is missing"):
        open_checkpoint(tmp_path)


def test_flat_tensors_without_shapes(tmp_path: Path) -> None:
    folder = layout.write(tmp_path, stage=3)
    for file in folder.glob("*model_states.pt"):
        file.unlink()
    with pytest.raises(CorruptCheckpoint, match="holds a flat tensor, and no model file says its shape"):
        open_checkpoint(tmp_path)


@LAYOUTS
@pytest.mark.parametrize("state", ["fp32", "exp_avg"])
def test_a_cut_off_file_is_found(tmp_path: Path, stage: int, state: str) -> None:
    folder = layout.write(tmp_path, stage=stage)
    file = folder / "zero" / "norm.bias" / f"{state}.pt"
    for count in (0, 10, file.stat().st_size - 1):
        os.truncate(file, count) if count < file.stat().st_size else None
        with pytest.raises(CorruptCheckpoint, match=rf"norm\.bias/{state}\.pt is corrupt at tensor norm\.bias"):
            value(open_checkpoint(tmp_path), "norm.bias" if state == "fp32" else f"norm.bias.{state}")


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (torch.zeros(4, 5), "holds F32 .* where F32 .* is expected|has shape|its shape"),
        (torch.zeros(5, dtype=torch.float64), "it holds F64 .* where F32"),
        ({"param": torch.zeros(5), "other": torch.zeros(5)}, "instead of a tensor"),
        ({"param": 3}, "instead of a tensor"),
        ("text", "instead of a tensor"),
    ],
)
@LAYOUTS
def test_a_file_unlike_the_others_is_found(tmp_path: Path, stage: int, held: Any, words: str) -> None:
    folder = layout.write(tmp_path, stage=stage)
    torch.save(held, folder / "zero" / "norm.bias" / "exp_avg.pt")
    with pytest.raises(CorruptCheckpoint, match=words):
        value(open_checkpoint(tmp_path), "norm.bias.exp_avg")


class Payload:
    def __reduce__(self) -> Any:
        return (os.system, ("touch executed",))


@LAYOUTS
@pytest.mark.parametrize("file", ["zero/lift/fp32.pt", "zero/lift/step.pt", "zero/optimizer_state.pt"])
def test_nothing_is_executed(tmp_path: Path, stage: int, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = layout.write(tmp_path, stage=stage)
    torch.save({"param": Payload()}, folder / file)
    with pytest.raises(CheckpointError):
        value(open_checkpoint(tmp_path), "lift")
        value(open_checkpoint(tmp_path), "lift.step")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("param_shapes", 5),
        ("param_shapes", [{"lift": "x"}]),
        ("param_shapes", [{"lift": torch.Size((2, 3, 4))}] * 2),
        ("param_shapes", [{3: torch.Size((2, 3, 4))}]),
        ("param_shapes", [{"absent": torch.Size((1,))}]),
        ("param_shapes", [{"lift": torch.Size((2**40, 2**40))}]),
        ("module", [1]),
        ("shared_params", {"tied.weight": 3}),
        ("buffer_names", [None]),
        ("frozen_param_shapes", {"offset": torch.Size((9,))}),
        ("global_steps", "many"),
    ],
)
@LAYOUTS
def test_a_damaged_model_file_is_named(tmp_path: Path, stage: int, key: str, wrong: Any) -> None:
    folder = layout.write(tmp_path, stage=stage)
    for file in folder.glob("*model_states.pt"):
        model = torch.load(file, weights_only=True)
        model[key] = wrong
        torch.save(model, file)
    if (key, stage) == ("frozen_param_shapes", 1):
        return  # the module itself has the values
    with pytest.raises(CorruptCheckpoint, match=r"step7_universal/|checkpoint file"):
        view = open_checkpoint(tmp_path)
        for name in view.tensors:
            value(view, name)


@pytest.mark.parametrize("wrong", [5, [5], [{"lr": 1}], [{"params": [0]}], [{"params": 3}]])
@LAYOUTS
def test_damaged_groups_are_named(tmp_path: Path, stage: int, wrong: Any) -> None:
    folder = layout.write(tmp_path, stage=stage)
    file = folder / "zero" / "optimizer_state.pt"
    torch.save(torch.load(file, weights_only=True) | {"param_groups": wrong}, file)
    with pytest.raises(CorruptCheckpoint, match=r"optimizer_state\.pt is corrupt"):
        open_checkpoint(tmp_path)


def test_model_files_are_those_of_all_ranks_and_hold_models(tmp_path: Path) -> None:
    folder = layout.write(tmp_path, stage=1)
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_02_model_states.pt")
    with pytest.raises(CorruptCheckpoint, match=r"mp_rank_01_model_states\.pt is corrupt: it is missing"):
        open_checkpoint(tmp_path)
    (folder / "mp_rank_02_model_states.pt").unlink()
    shutil.copy(folder / "zero" / "optimizer_state.pt", folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CorruptCheckpoint, match=r"mp_rank_00_model_states\.pt is corrupt: .* is no model file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("missing", [0, 1])
def test_pieces_of_later_ranks_do_not_take_the_place_of_a_missing_one_s(tmp_path: Path, missing: int) -> None:
    layout.write(tmp_path, stage=3, world=3)
    (file,) = tmp_path.rglob(f"zero_pp_rank_{missing}_mp_rank_00_model_states.pt")
    file.unlink()
    with pytest.raises(CorruptCheckpoint, match=f"zero_pp_rank_{missing}_mp_rank_00_model_states.pt.*it is missing"):
        open_checkpoint(tmp_path)
