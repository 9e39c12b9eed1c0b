"""Megatron-LM's `torch_dist` checkpoints, written from their published description (see `megatron_dist_writer`)."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint import rulefile
from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint
from tests.unit.checkpoint.formats.megatron_dist_writer import DistJob, write
from tests.unit.checkpoint.formats.megatron_writer import Model
from tests.unit.checkpoint.formats.test_megatron import tensor

JOBS = {
    "gpt": lambda: DistJob(Model(layers=2)),
    "gpt tp": lambda: DistJob(Model(layers=2), tensor=2),
    "gpt numbered layers": lambda: DistJob(Model(layers=2), tensor=2, stacked=False),
    "llama tp": lambda: DistJob(Model("llama", tied=False, layers=2), tensor=2),
    "llama dp": lambda: DistJob(Model("llama", tied=False, layers=2), data=3),
    "llama tp dp": lambda: DistJob(Model("llama", tied=False, layers=3), tensor=2, data=4),
    "llama tp dp numbered": lambda: DistJob(Model("llama", tied=False, layers=2), tensor=2, data=2, stacked=False),
    "chained": lambda: DistJob(Model(layers=2), chained=True),
    "mixtral": lambda: DistJob(Model("mixtral", tied=False, layers=2, experts=2), tensor=2, data=2),
    "weights only": lambda: DistJob(Model(layers=2), optimizer=False),
    "fp32": lambda: DistJob(Model(layers=2), dtype=torch.float32, data=2),
}


@pytest.mark.parametrize("make", JOBS.values(), ids=JOBS.keys())
def test_the_view_is_the_whole_model(tmp_path: Path, make: Callable[[], DistJob]) -> None:
    job = make()
    write(job, tmp_path)
    view = open_checkpoint(tmp_path)
    assert (view.source, view.step) == ("megatron-lm torch_dist", 100)
    assert {one.name for one in view.tensors.values() if one.state is None} == set(job.model.tensors)
    for name, whole in job.model.tensors.items():
        if not job.optimizer:
            assert torch.equal(tensor(view, name), whole.to(job.dtype)), name
            continue
        assert torch.equal(tensor(view, name), whole), name
        assert view.training_dtypes.get(name) == (None if job.dtype == torch.float32 else "BF16")
        for state in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(tensor(view, f"{name}.{state}"), job.state(name, state)), (name, state)
        assert tensor(view, f"{name}.step").item() == 7
    if job.optimizer:
        decayed, plain = view.state["param_groups"]
        assert sorted([*decayed["params"], *plain["params"]]) == sorted(job.model.tensors)
        assert {job.model.tensors[name].ndim for name in plain["params"]} == {1}


def test_padding_is_cut_of_flattened_cells_too(tmp_path: Path) -> None:
    job = DistJob(Model(layers=1), tensor=2, data=3)
    write(job, tmp_path)
    view = open_checkpoint(tmp_path, rules=rulefile.named("megatron-torch-dist-gpt").filled({"vocab": 13}))
    name = "embedding.word_embeddings.weight"
    assert torch.equal(tensor(view, name), job.model.tensors[name][:13])
    assert torch.equal(tensor(view, f"{name}.exp_avg"), job.state(name, "exp_avg")[:13])


def changed(tmp_path: Path, change: Callable[[Any], object]) -> Path:
    folder = write(DistJob(Model(layers=2), tensor=2, data=2), tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return tmp_path


FINAL = "decoder.final_layernorm.weight"
AVERAGE = f"optimizer.state.exp_avg.{FINAL}"


def _rename(metadata: Any, old: str, new: str) -> None:
    metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)
    metadata.storage_data = {
        index.__class__(new if index.fqn == old else index.fqn, index.offset): place
        for index, place in metadata.storage_data.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.state_dict_metadata.pop(FINAL), f"tensor {FINAL}: it has optimizer states but no value"),
        (lambda one: one.mcore_data.clear(), "but the parameter"),
        (
            lambda one: one.mcore_data[f"optimizer.state.exp_avg.{FINAL}"].update(
                nd_reformulated_orig_global_shape=(9,)
            ),
            "the grid [1, 8] is none of its shape [9]",
        ),
        (
            lambda one: one.mcore_data[AVERAGE].update(nd_reformulated_orig_global_shape=3),
            "its original shape is not counts",
        ),
        (lambda one: _rename(one, FINAL, "decoder.layers.0.mlp.linear_fc1.bias"), "it is there twice"),
        (lambda one: _rename(one, FINAL, "unheard.of"), "no value"),
        (lambda one: one.state_dict_metadata[FINAL].chunks.clear(), "no chunk holds"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    with pytest.raises(CorruptCheckpoint) as raised:
        open_checkpoint(changed(tmp_path, change))
    assert message in str(raised.value)
    assert ".metadata" in str(raised.value)


def test_states_in_buckets_are_refused(tmp_path: Path) -> None:
    bucket = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.float32, torch.float32).bucket_idx_0.param"
    with pytest.raises(CheckpointError, match="in the order of communication buckets"):
        open_checkpoint(changed(tmp_path, lambda one: _rename(one, AVERAGE, bucket)))


def test_without_its_common_file_it_is_not_taken_for_a_plain_distributed_checkpoint(tmp_path: Path) -> None:
    folder = write(DistJob(Model(layers=2)), tmp_path)
    (folder / "common.pt").unlink()
    for place in (tmp_path, folder):
        with pytest.raises(CorruptCheckpoint, match=r"iter_0000100/common\.pt is corrupt: it is missing"):
            open_checkpoint(place)


def test_the_file_that_names_the_last_iteration_says_whose_it_is(tmp_path: Path) -> None:
    folder = write(DistJob(Model(layers=2)), tmp_path)
    (folder / "common.pt").unlink()
    (folder / "metadata.json").write_bytes(b"")
    with pytest.raises(CorruptCheckpoint, match=r"iter_0000100/common\.pt is corrupt: it is missing"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(folder).source == "dcp", "by itself it is a plain distributed checkpoint"
