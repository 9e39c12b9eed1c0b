"""Folders and files that are not as DeepSpeed saved them: one clear error each, or the same bytes."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.formats.deepspeed import recognise
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.location import files_at
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint
from tests.unit.checkpoint.formats.deepspeed_writer import (
    Layout,
    contents,
    deepspeed_names,
    fragment_address,
    model,
    save,
)
from tests.unit.checkpoint.formats.test_deepspeed_zero import assert_holds, change, rich

OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def refused(root: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(root, source="deepspeed")


# ---------------------------------------------------------------- folders


def test_the_tag_is_what_is_asked_for_else_the_newest(tmp_path: Path) -> None:
    one, two = model([[("a", (3,))]], seed=1), model([[("a", (3,))]], seed=2)
    save(tmp_path, one, Layout(1, 1), tag="first")
    save(tmp_path, two, Layout(1, 1), tag="second")
    assert_holds(open_checkpoint(tmp_path), two.expected())
    assert_holds(open_checkpoint(tmp_path, tag="first"), one.expected())
    assert_holds(open_checkpoint(tmp_path / "first"), one.expected())
    assert_holds(open_checkpoint(tmp_path / "first", tag="first"), one.expected())
    with pytest.raises(CheckpointError, match="choose a tag of first, second"):
        open_checkpoint(tmp_path, tag="third")
    with pytest.raises(CheckpointError, match="is the folder of checkpoint first, not of second"):
        open_checkpoint(tmp_path / "first", tag="second")
    (tmp_path / "latest").unlink()
    refused(tmp_path, "has no file latest .* choose a tag of first, second")
    shutil.rmtree(tmp_path / "second")
    assert_holds(open_checkpoint(tmp_path), one.expected())
    (tmp_path / "latest").write_text("gone")
    refused(tmp_path, "holds no DeepSpeed checkpoint gone")
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    refused(tmp_path, "does not hold the name of a checkpoint")


def test_what_is_recognised(tmp_path: Path) -> None:
    save(tmp_path / "a", rich(), Layout(1, 2))
    assert recognise(files_at(tmp_path / "a"))
    assert recognise(files_at(tmp_path / "a" / "step3"))
    (tmp_path / "b" / "zero" / "w").mkdir(parents=True)  # DeepSpeed's universal form holds copies of model files
    (tmp_path / "b" / "zero" / "w" / "fp32.pt").touch()
    (tmp_path / "b" / "mp_rank_00_model_states.pt").touch()
    assert not recognise(files_at(tmp_path / "b"))
    (tmp_path / "c" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "c" / "mp_rank_00" / "model_optim_rng.pt").touch()
    assert not recognise(files_at(tmp_path / "c"))


def test_ranks_are_numbers(tmp_path: Path) -> None:
    made = model([[("a", (257, 2))]])
    for stage in (1, 3):
        save(tmp_path / str(stage), made, Layout(stage, 103))
        assert_holds(open_checkpoint(tmp_path / str(stage)), made.expected())


def test_an_optimizer_s_file_is_no_model_file(tmp_path: Path) -> None:
    folder = save(tmp_path, rich(), Layout(1, 2))
    for rank in (0, 1):
        (folder / OPTIMIZER.format(rank)).rename(folder / "mp_rank_00_model_states.pt")
    refused(tmp_path, "mp_rank_00_model_states.pt is corrupt: it holds neither module nor param_shapes")


@pytest.mark.parametrize("stage", [1, 3])
def test_a_missing_rank_is_named(tmp_path: Path, stage: int) -> None:
    folder = save(tmp_path, rich(), Layout(stage, 3))
    for rank in (2, 0):
        (folder / OPTIMIZER.format(rank)).rename(tmp_path / "aside")
        refused(tmp_path, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt is corrupt: it is missing")
        (tmp_path / "aside").rename(folder / OPTIMIZER.format(rank))


def test_model_files_are_missed_where_something_is_lost(tmp_path: Path) -> None:
    folder = save(tmp_path, rich(), Layout(1, 2))
    (folder / "mp_rank_00_model_states.pt").unlink()
    refused(tmp_path, "mp_rank_00_model_states.pt is corrupt: it is missing")
    folder = save(tmp_path / "z3", rich(), Layout(3, 2))
    (folder / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    refused(tmp_path / "z3", "zero_pp_rank_1_mp_rank_00_model_states.pt is corrupt: it is missing")
    made = model([[("a", (5,))]])
    folder = save(tmp_path / "plain", made, Layout(3, 2))
    (folder / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()  # says nothing that rank 0's does not
    assert_holds(open_checkpoint(tmp_path / "plain"), made.expected())


def test_masters_that_zero_keeps_in_files_of_their_own_are_missed(tmp_path: Path) -> None:
    """Not read as the rounded weights of the model file."""
    folder = save(tmp_path, rich(), Layout(1, 2))
    for rank in range(2):
        (folder / OPTIMIZER.format(rank)).unlink()
    refused(tmp_path, "zero_pp_rank_0_mp_rank_00_optim_states.pt is corrupt: it is missing")


def test_files_of_an_older_larger_save_are_passed_over_and_noted(tmp_path: Path) -> None:
    made = rich()
    save(tmp_path, rich(), Layout(1, 4))
    save(tmp_path, made, Layout(1, 2))
    view = open_checkpoint(tmp_path)
    assert_holds(view, made.expected())
    assert "files of ranks from 2 on are of an older save" in view.notes[0]


def test_files_of_experts_hold_experts(tmp_path: Path) -> None:
    folder = save(tmp_path, rich(), Layout(1, 2))
    torch.save({"a.weight": torch.ones(2)}, folder / "layer_0_expert_0_mp_rank_00_model_states.pt")
    refused(tmp_path, "layer_0_expert_0_mp_rank_00_model_states.pt.* is not named as a parameter of an expert")


def test_two_files_of_one_rank(tmp_path: Path) -> None:
    folder = save(tmp_path, rich(), Layout(1, 2))
    shutil.copy(folder / OPTIMIZER.format(0), folder / OPTIMIZER.format(0).removeprefix("bf16_"))
    refused(tmp_path, "is of the same rank: remove the one of another, older save")


# ---------------------------------------------------------------- files


def test_swapped_ranks_are_found(tmp_path: Path) -> None:
    folder = save(tmp_path, rich(), Layout(1, 3))
    (folder / OPTIMIZER.format(0)).rename(tmp_path / "aside")
    (folder / OPTIMIZER.format(1)).rename(folder / OPTIMIZER.format(0))
    (tmp_path / "aside").rename(folder / OPTIMIZER.format(1))
    refused(tmp_path, "corrupt")


def test_a_file_of_another_checkpoint_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", rich(), Layout(1, 2))
    other = save(tmp_path / "b", model([[("a.weight", (6, 7))]], dtype=torch.bfloat16), Layout(1, 2))
    shutil.copy(other / OPTIMIZER.format(1), folder / OPTIMIZER.format(1))
    refused(tmp_path / "a", OPTIMIZER.format(1))


EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "mapping": (lambda s: s["param_slice_mappings"][0].update({"a.bias": fragment_address(7, 1)}), "at tensor a.bias"),
    "unknown": (lambda s: s["param_slice_mappings"][0].update({"x": fragment_address(7, 1)}), "at tensor x"),
    "short": (lambda s: s["single_partition_of_fp32_groups"].__setitem__(0, torch.zeros(3)), "has 3 elements"),
    "moment": (lambda s: s["base_optimizer_state"]["state"][0].update(exp_avg=torch.zeros(3)), "exp_avg is a tensor"),
    "lacking": (lambda s: s["base_optimizer_state"]["state"][0].pop("exp_avg"), "lacks exp_avg"),
    "stateless": (lambda s: s["base_optimizer_state"]["state"].pop(0), "data-parallel rank 1 are missing"),
    "step": (
        lambda s: s["base_optimizer_state"]["state"][0].update(step=torch.tensor(4.0)),
        "but rank 0 has taken 3.0 steps",
    ),
    "steps": (lambda s: s["base_optimizer_state"]["state"][0].update(step=torch.tensor(-4.0)), "step is expected"),
    "world": (lambda s: s.update(partition_count=[7, 7, 7]), "cut over 7 ranks where 2 are expected"),
    "groups": (lambda s: s["single_partition_of_fp32_groups"].pop(), "2 parameter groups where param_shapes has 3"),
    "padding": (lambda s: s.update(group_paddings=[9, 9, 9]), r"says 9 in group_paddings\[0\]"),
    "nothing": (lambda s: s.clear(), "lacks single_partition_of_fp32_groups"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_does_not_fit_is_named(tmp_path: Path, edit: str) -> None:
    folder = save(tmp_path, rich(), Layout(1, 2))
    change(folder / OPTIMIZER.format(1), EDITS[edit][0])
    with pytest.raises(CorruptCheckpoint, match=EDITS[edit][1]) as raised:
        open_checkpoint(tmp_path)
    assert OPTIMIZER.format(1) in str(raised.value) or edit == "stateless"


MODEL_EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "shape": (lambda s: s["param_shapes"][0].update({"a.weight": torch.Size((7, 7))}), "corrupt"),
    "huge": (lambda s: s["param_shapes"][0].update({"a.weight": torch.Size((2**40, 2**40))}), "larger than any tensor"),
    "name": (lambda s: s["param_shapes"][0].update({5: torch.Size((1,))}), "has the key 5"),
    "text": (lambda s: s.update(param_shapes="x"), "param_shapes is 'x' where a list"),
    "twice": (lambda s: s["param_shapes"][1].update({"a.bias": torch.Size((7,))}), "corrupt at tensor a.bias"),
    "module": (lambda s: s["module"].update({"a.bias": torch.zeros(8)}), "at tensor a.bias: .*has shape"),
    "ranks": (lambda s: s.update(checkpoint_parallel_dimensions={"pp_degree": 2, "tp_degree": 2}), "2 pipeline stages"),
}


@pytest.mark.parametrize("edit", MODEL_EDITS)
def test_what_does_not_fit_in_the_model_file_is_named(tmp_path: Path, edit: str) -> None:
    folder = save(tmp_path, rich(), Layout(1, 2))
    change(folder / "mp_rank_00_model_states.pt", MODEL_EDITS[edit][0])
    refused(tmp_path, MODEL_EDITS[edit][1])


JUNK = [None, -1, 10**30, "x", (), [], {}, {"a": 1}, 2.5, True, torch.zeros(2), torch.zeros(()), b"x", ["x"], object]


def damaged(value: Any, chance: random.Random) -> Any:
    """The value with one member, somewhere in it, replaced or left out."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        if not keys:
            return value
        key = chance.choice(keys)
        inside = value[key]
        if isinstance(inside, dict | list) and inside and chance.random() < 0.8:
            value = inside
        elif isinstance(value, dict) and chance.random() < 0.3:
            del value[key]
            return value
        else:
            value[key] = chance.choice(JUNK)
            return value


@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(1, 2, "bf16"), Layout(1, 2, "elastic"), Layout(3, 2)], ids=str)
def test_random_damage_is_a_clean_error_or_does_no_harm(tmp_path: Path, layout: Layout) -> None:
    made = rich()
    folder = save(tmp_path, made, layout)
    files = contents(made, layout)
    chance = random.Random(layout.style)
    for _ in range(20):
        name = chance.choice(list(files))
        content = copy.deepcopy(files[name])
        damaged(content, chance)
        with deepspeed_names():
            torch.save(content, folder / name)
        try:
            view = open_checkpoint(tmp_path, source="deepspeed")
            for tensor in view.tensors.values():
                view.read(tensor.name, Box.whole(tensor.shape), bytearray(tensor.size_bytes))
        except CheckpointError:
            pass
        with deepspeed_names():
            torch.save(files[name], folder / name)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float) -> None:
    folder = save(tmp_path, rich(), Layout(1, 2))
    file = folder / OPTIMIZER.format(1)
    data = file.read_bytes()
    file.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    refused(tmp_path, OPTIMIZER.format(1))
