"""DeepSpeed itself goes on from what regrow wrote: at other world sizes, under other stages, with the same state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.checkpoint.archive import StoredTensor, load_archive
from orchestrator.checkpoint.convert import Conversion, convert
from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.unpickle import Record
from orchestrator.checkpoint.view import UniversalView
from tests.peers import data
from tests.peers.cases import RUNS, launches

pytestmark = [pytest.mark.peer, pytest.mark.timeout(3600)]


@dataclass(frozen=True)
class Resumed:
    losses: list[float]
    tensors: dict[str, torch.Tensor]
    known: dict[str, Any]


def write(source: Path, folder: Path, stage: int) -> Path:
    """The checkpoint as regrow writes it for DeepSpeed; returns the root for `load_checkpoint`."""
    folder.mkdir()
    convert(source, folder / "resumed", Conversion(to="deepspeed-universal", stage=stage))
    return folder


def resume(name: str, root: Path, world: int, *options: str) -> Resumed:
    loaded = root / "loaded.safetensors"
    losses = data.resume(name, root, world, extra=("--loaded", str(loaded), *options))
    return Resumed(losses, load_file(loaded), json.loads(loaded.with_suffix(".json").read_text()))


def require_same_state(source: str, found: Resumed, *kinds: str) -> None:
    """What DeepSpeed has loaded is what the run had when it saved, bit for bit."""
    live = data.checkpoint(source).live()
    keys = [key for key in live if key.startswith(kinds or ("master/", "state/", "weight/"))]
    assert keys
    for key in keys:
        assert torch.equal(found.tensors[key], live[key]), key


def steps(known: dict[str, Any]) -> set[float]:
    return set(known["scalars"]["step"].values())


OWN = [
    ("z1-fp32-w4", 1, 2),
    ("z2-bf16-w3", 2, 4),
    ("z3-bf16-w4", 3, 3),
]


@pytest.mark.parametrize(("name", "stage", "world"), OWN)
def test_losses_are_those_from_its_own_converter(tmp_path: Path, name: str, stage: int, world: int) -> None:
    made = data.checkpoint(name)
    theirs = made.universal()
    assert theirs is not None
    reference = data.resume(name, theirs.parent, world)
    found = resume(name, write(made.root, tmp_path / "ours", stage), world)
    assert found.losses == reference
    require_same_state(name, found)
    assert steps(found.known) == steps(made.known()) and found.known["global_steps"] == made.known()["global_steps"]


OTHER_STAGES = [
    ("z1-fp32-w4", "z3-fp32-w4", 3),
    ("z3-fp32-w4", "z1-fp32-w4", 3),
    ("z3-bf16-w3", "z2-bf16-w3", 4),
    ("z1-bf16-w4-tied", "z3-bf16-w3-tied", 2),
    ("z3-bf16-w3-tied", "z1-bf16-w4-tied", 2),
]


@pytest.mark.parametrize(("source", "target", "world"), OTHER_STAGES)
def test_any_stage_goes_on_under_any_other(tmp_path: Path, source: str, target: str, world: int) -> None:
    root = write(data.checkpoint(source).root, tmp_path / "ours", RUNS[target].stage)
    found = resume(target, root, world)
    require_same_state(source, found)
    assert steps(found.known) == steps(data.checkpoint(source).known())
    theirs = data.checkpoint(source).universal()
    assert theirs is not None
    same_stage = data.resume(source, theirs.parent, world)
    tolerance = 1e-5 if RUNS[source].dtype == "fp32" else 2e-2
    assert found.losses == pytest.approx(same_stage, rel=tolerance)


def test_its_own_conversion_of_one_stage_does_not_load_under_another() -> None:
    """Should that change, the tests above have a peer to be held to."""
    theirs = data.checkpoint("z1-fp32-w4").universal()
    assert theirs is not None
    with pytest.raises(RuntimeError, match="AssertionError"):
        data.resume("z3-fp32-w4", theirs.parent, 2)


def test_there_and_back_is_the_same_checkpoint(tmp_path: Path) -> None:
    """Any stage to any other, and what came from DeepSpeed's own converter: always the same tensors."""
    made = data.checkpoint("z1-bf16-w4-tied")
    root = made.root
    for index, stage in enumerate((3, 1, 3, 2)):
        root = write(root, tmp_path / str(index), stage)
    first, last = open_checkpoint(made.root), open_checkpoint(root)
    assert contents(last) == contents(first)
    assert last.aliases == first.aliases and last.training_dtypes == first.training_dtypes
    assert last.state["param_groups"] == first.state["param_groups"]


def contents(view: UniversalView) -> dict[str, bytes]:
    found = {}
    for name, tensor in view.tensors.items():
        out = bytearray(tensor.size_bytes)
        view.read(name, Box.whole(tensor.shape), out)
        found[name] = bytes(out)
    return found


def converted_well(launch: str) -> list[data.Checkpoint]:
    made = [data.checkpoint(run.name) for run in launches()[launch]]
    return [one for one in made if not one.conversion_error and not one.conversion_wrong]


@pytest.mark.parametrize("launch", launches())
def test_what_its_own_converter_wrote_reads_as_what_it_was_made_from(launch: str) -> None:
    """Two readers that share nothing but the names."""
    for made in converted_well(launch):
        theirs = made.universal()
        assert theirs is not None
        universal, plain = open_checkpoint(theirs), open_checkpoint(made.root)
        assert contents(universal) == contents(plain), made.name
        for key in ("step", "aliases", "frozen", "training_dtypes", "state"):
            assert getattr(universal, key) == getattr(plain, key), (made.name, key)


@pytest.mark.parametrize("launch", [name for name in launches() if "tp" in name])
def test_files_say_what_those_of_its_own_converter_say(tmp_path: Path, launch: str) -> None:
    """Megatron-DeepSpeed cuts the tensors again by what is in these files beside them."""
    for made in converted_well(launch):
        theirs = made.universal()
        assert theirs is not None
        root = write(made.root, tmp_path / made.name, 1)
        ours = LocalFiles(root / "resumed")
        names = {name for name in ours.names() if name.startswith("zero/") and "optimizer_state" not in name}
        assert len(names) > 100
        for name in names:
            assert shown(load_archive(ours, name)) == shown(load_archive(LocalFiles(theirs), name)), (made.name, name)


def shown(value: Any) -> Any:
    """What an archive holds, without where."""
    if isinstance(value, StoredTensor):
        return value.dtype, value.shape
    if isinstance(value, Record):
        return str(value.name), shown(value.state)
    if isinstance(value, dict):
        return {key: shown(member) for key, member in value.items()}
    return [shown(member) for member in value] if isinstance(value, list | tuple) else value


def test_round_robin_order_where_its_own_converter_is_wrong(tmp_path: Path) -> None:
    """It goes on without that order: with it DeepSpeed's loader, too, takes each other's places for parameters."""
    name = "z2-bf16-w4-roundrobin"
    assert data.checkpoint(name).conversion_wrong
    found = resume("z2-bf16-w3", write(data.checkpoint(name).root, tmp_path / "ours", 2), 3)
    require_same_state(name, found)


def test_groups_keep_their_hyper_parameters_under_zero_3(tmp_path: Path) -> None:
    """DeepSpeed gives all groups those of the first; regrow's file has only what they have in common."""
    made = data.checkpoint("z1-fp32-w4-groups")
    found = resume("z3-fp32-w3-groups", write(made.root, tmp_path / "ours", 3), 2)
    require_same_state("z1-fp32-w4-groups", found)
    groups = [group["hyper"] for group in made.known()["groups"]]
    assert len({group["lr"] for group in groups}) == 3
    for ours, theirs in zip(found.known["groups"], groups, strict=True):
        assert (ours["lr"], ours["weight_decay"]) == (theirs["lr"], theirs["weight_decay"])


def test_hyper_parameters_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """The script's own learning rates are wrong here until the checkpoint is loaded."""
    made = data.checkpoint("z3-bf16-w4-groups")
    found = resume("z1-bf16-w3-groups", write(made.root, tmp_path / "ours", 1), 1, "--spoiled")
    require_same_state("z3-bf16-w4-groups", found)
    assert [group["lr"] for group in found.known["groups"]] == [
        group["hyper"]["lr"] for group in made.known()["groups"]
    ]


FROZEN = [("z3-bf16-w4-frozen", "z1-bf16-w3-frozen"), ("z1-bf16-w3-frozen", "z3-bf16-w4-frozen")]


@pytest.mark.parametrize(("source", "target"), FROZEN)
def test_what_is_not_trained_and_buffers_load_from_the_module(tmp_path: Path, source: str, target: str) -> None:
    root = write(data.checkpoint(source).root, tmp_path / "ours", RUNS[target].stage)
    (module,) = (root / "resumed").glob("*model_states.pt")
    found = resume(target, root, 2, "--module", str(module))
    require_same_state(source, found)
    require_same_state(source, found, "frozen/", "buffer/")


def test_states_of_other_optimizers(tmp_path: Path) -> None:
    """DeepSpeed's own converter knows Adam's alone."""
    name = "z2-bf16-w3-sgd"
    assert data.checkpoint(name).universal() is None
    found = resume(name, write(data.checkpoint(name).root, tmp_path / "ours", 2), 2)
    require_same_state(name, found)
    assert any(key.startswith("state/momentum_buffer/") for key in found.tensors)
