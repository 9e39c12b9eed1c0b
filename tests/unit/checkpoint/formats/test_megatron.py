"""Megatron-LM's `torch` checkpoints, written from their published description (see `megatron_writer`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint import rulefile
from orchestrator.checkpoint.agreement_of_copies import disagreements
from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.reshard import flaw
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint
from tests.unit.checkpoint.formats.megatron_writer import Job, Model, write

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def tensor(view: UniversalView, name: str) -> torch.Tensor:
    one = view.tensors[name]
    assert flaw(one.shape, [chunk.box for chunk in one.chunks]) is None
    out = bytearray(max(one.size_bytes, 1))
    view.read(name, Box.whole(one.shape), memoryview(out)[: one.size_bytes])
    return torch.frombuffer(out, dtype=DTYPES[one.dtype])[: max(1, one.size_bytes // one.item_bytes)].reshape(one.shape)


def assert_equal(job: Job, view: UniversalView) -> None:
    """Every tensor of the view is the whole tensor of the job, bit for bit."""
    names = set(job.model.tensors)
    parameters = {name for name, one in view.tensors.items() if one.state is None}
    assert parameters == names
    for name in names:
        whole = job.model.tensors[name]
        if job.optimizer in ("float16", "distributed"):
            assert torch.equal(tensor(view, name), whole), name
            expected = {} if job.dtype == torch.float32 else {name: "BF16"}
            assert view.training_dtypes.items() >= expected.items()
        else:
            assert torch.equal(tensor(view, name), whole.to(job.dtype)), name
        if job.optimizer == "none":
            continue
        for state in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(tensor(view, f"{name}.{state}"), job.state(name, state)), (name, state)
        assert tensor(view, f"{name}.step").item() == 7
    assert list(disagreements(view)) == []
    assert view.step == job.iteration


JOBS = {
    "gpt alone": lambda: Job(Model()),
    "gpt tp": lambda: Job(Model(), tensor=2),
    "gpt tp pp tied": lambda: Job(Model(), tensor=2, stages=2),
    "gpt virtual stages tied": lambda: Job(Model(layers=8), stages=2, virtual=2),
    "gpt untied fp32": lambda: Job(Model(tied=False), tensor=4, dtype=torch.float32, optimizer="fp32"),
    "gpt legacy tp": lambda: Job(Model(core=False), tensor=2, apex=False),
    "gpt legacy tp pp tied": lambda: Job(Model(core=False), tensor=2, stages=4),
    "llama legacy untied": lambda: Job(Model("llama", core=False, tied=False), tensor=2, stages=2),
    "llama groups": lambda: Job(Model("llama", tied=False, groups=2), tensor=2, stages=2, apex=False),
    "llama weights only": lambda: Job(Model("llama", tied=False), tensor=2, optimizer="none"),
    "mixtral ep": lambda: Job(Model("mixtral", tied=False, experts=4), tensor=2, expert=2),
    "mixtral pp ep": lambda: Job(Model("mixtral", tied=False, experts=4), stages=2, expert=4),
    "mixtral": lambda: Job(Model("mixtral", tied=False, experts=2), tensor=2),
    "distributed": lambda: Job(Model("llama", tied=False), tensor=2, stages=2, optimizer="distributed"),
    "distributed ragged tied": lambda: Job(Model(ffn=20), stages=2, optimizer="distributed"),
    "distributed virtual": lambda: Job(Model(), stages=2, virtual=2, optimizer="distributed"),
}


@pytest.mark.parametrize("make", JOBS.values(), ids=JOBS.keys())
def test_the_view_is_the_whole_model(tmp_path: Path, make: Callable[[], Job]) -> None:
    job = make()
    write(job, tmp_path)
    view = open_checkpoint(tmp_path)
    assert view.source == "megatron-lm"
    assert_equal(job, view)
    if job.model.tied and job.stages > 1:
        embedding = next(iter(job.model.tensors))
        alias = "output_layer.weight" if job.model.core else "word_embeddings_for_head.weight"
        assert view.aliases == {alias: embedding}
        assert len(view.tensors[embedding].others) == 1


def test_what_is_kept_beside_tensors(tmp_path: Path) -> None:
    job = Job(Model(), tensor=2, stages=2)
    write(job, tmp_path)
    view = open_checkpoint(tmp_path)
    decayed, plain = view.state["param_groups"]
    assert sorted([*decayed["params"], *plain["params"]]) == sorted(job.model.tensors)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(job.model.tensors[name].ndim == 2 for name in decayed["params"])
    assert view.state["opt_param_scheduler"] == {"max_lr": 0.1, "num_steps": 700}
    assert view.state["grad_scaler"] == {"scale": 4.0}
    assert view.state["iteration"] == 100
    assert view.state["args"]["hidden_size"] == 8
    assert any("padding beyond it is kept" in note for note in view.notes)
    assert any("_extra_state" in note for note in view.notes)
    assert any("rng_state" in note for note in view.notes)


def test_rules_tell_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    job = Job(Model(), tensor=2)
    write(job, tmp_path)
    rules = rulefile.named("megatron-lm-gpt").filled({"vocab": 13})
    view = open_checkpoint(tmp_path, rules=rules)
    name = "embedding.word_embeddings.weight"
    assert view.tensors[name].shape == view.tensors[f"{name}.exp_avg"].shape == (13, 8)
    assert torch.equal(tensor(view, name), job.model.tensors[name][:13])
    assert "padding beyond 13" in str(view.tensors[name].rule)


def test_wrong_rules_are_refused(tmp_path: Path) -> None:
    write(Job(Model("mixtral", tied=False, experts=2)), tmp_path)
    with pytest.raises(CheckpointError, match=r"mlp\.router\.weight is matched by none"):
        open_checkpoint(tmp_path, rules=rulefile.named("megatron-lm-llama"))


def test_which_iteration(tmp_path: Path) -> None:
    for iteration in (100, 200):
        write(Job(Model(layers=1), iteration=iteration, optimizer="none"), tmp_path)
    (tmp_path / "iter_0000200").rename(tmp_path / "release")
    assert open_checkpoint(tmp_path, tag="100").step == 100
    assert open_checkpoint(tmp_path, tag="release").step == 200
    assert open_checkpoint(tmp_path / "release").step == 200
    with pytest.raises(CorruptCheckpoint, match="it names 200, which is not there"):
        open_checkpoint(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert open_checkpoint(tmp_path).step == 200
    with pytest.raises(CheckpointError, match="holds no checkpoint 300: choose one of iter_0000100, release"):
        open_checkpoint(tmp_path, tag="300")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CorruptCheckpoint, match="neither an iteration nor release"):
        open_checkpoint(tmp_path)


def damaged(tmp_path: Path, change: Callable[[dict[str, Any]], None], job: Job | None = None) -> Path:
    """A checkpoint of two ranks, the second rank's file changed."""
    folder = write(job or Job(Model(layers=2), tensor=2), tmp_path) / "mp_rank_01"
    saved = torch.load(folder / "model_optim_rng.pt", weights_only=False)
    change(saved)
    torch.save(saved, folder / "model_optim_rng.pt")
    return tmp_path


def _swap(saved: dict[str, Any]) -> None:
    masters = saved["optimizer"]["fp32_from_fp16_params"][0]
    masters[0], masters[1] = masters[1], masters[0]


DAMAGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda saved: saved.pop("model"), "it lacks model"),
    (lambda saved: saved.update(model=3), "model is 3 where a mapping is expected"),
    (lambda saved: saved.update(args=3), "args is not the namespace"),
    (lambda saved: saved.update(iteration=7), "is of another iteration"),
    (lambda saved: setattr(saved["args"], "hidden_size", 9), "has another hidden_size"),
    (
        lambda saved: saved["model"].pop("decoder.final_layernorm.bias"),
        "parameters but 17 of the model are of its kind",
    ),
    (lambda saved: saved["model"].update({"decoder.layers.5.x": torch.zeros(1)}), "not those numbered from 0"),
    (lambda saved: saved["model"].update({"more.weight": torch.zeros(1, 1)}), "so that they cannot be named"),
    (lambda saved: saved["model"].update({"x" * 5000: torch.zeros(1)}), "holds a name of 5000 characters"),
    (_swap, "has the shape"),
    (lambda saved: saved["optimizer"]["fp32_from_fp16_params"].pop(), "has 1 groups but the optimizer 2"),
    (lambda saved: saved["optimizer"]["fp32_from_fp16_params"][1].pop(), "parameters in half precision"),
    (lambda saved: saved["optimizer"]["optimizer"]["param_groups"][0].pop("wd_mult"), "lacks wd_mult"),
    (lambda saved: saved["optimizer"]["optimizer"]["param_groups"][0].update(step="x"), "number of steps is expected"),
    (lambda saved: saved["optimizer"]["optimizer"]["param_groups"][0].update(step=8), "different steps"),
    (lambda saved: saved["optimizer"]["optimizer"]["param_groups"].pop(), "28 of the model are of its kind"),
    (lambda saved: saved["optimizer"]["optimizer"]["state"].update({0: 3}), "is 3 where a mapping is expected"),
    (lambda saved: saved["optimizer"]["optimizer"]["state"][0].update(exp_avg=torch.zeros(2)), "has the shape [2] but"),
    (lambda saved: saved["optimizer"]["optimizer"]["state"].pop(0), "is on some ranks only"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_damage_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(CorruptCheckpoint) as raised:
        open_checkpoint(damaged(tmp_path, change))
    assert message in str(raised.value)
    assert "model_optim_rng.pt" in str(raised.value)


def test_a_missing_or_superfluous_rank(tmp_path: Path) -> None:
    folder = write(Job(Model(layers=2), tensor=2), tmp_path)
    (folder / "mp_rank_01").rename(folder / "mp_rank_02")
    with pytest.raises(CheckpointError, match="has no file of tensor rank 1, stage 0, expert rank 0"):
        open_checkpoint(tmp_path)
    (folder / "mp_rank_02").rename(folder / "mp_rank_01")
    (folder / "mp_rank_02").mkdir()
    (folder / "mp_rank_02" / "model_optim_rng.pt").write_bytes(
        (folder / "mp_rank_01" / "model_optim_rng.pt").read_bytes()
    )
    with pytest.raises(CheckpointError, match="has 3 ranks instead of 2"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("swiglu", "message"), [(False, "its args say that it has 12 rows, but the ranks hold 24"), ("no", "a switch is")]
)
def test_a_fused_matrix_is_not_taken_for_a_plain_one(tmp_path: Path, swiglu: object, message: str) -> None:
    folder = write(Job(Model("llama", tied=False, layers=1), tensor=2), tmp_path)
    for rank in ("mp_rank_00", "mp_rank_01"):
        saved = torch.load(folder / rank / "model_optim_rng.pt", weights_only=False)
        saved["args"].swiglu = swiglu
        torch.save(saved, folder / rank / "model_optim_rng.pt")
    with pytest.raises(CorruptCheckpoint, match=message):
        open_checkpoint(tmp_path)


def test_stages_that_do_not_make_the_model(tmp_path: Path) -> None:
    job = Job(Model(layers=4), stages=2)
    folder = write(job, tmp_path)
    first = folder / "mp_rank_00_000" / "model_optim_rng.pt"
    saved = torch.load(first, weights_only=False)
    saved["model"] = {name: one for name, one in saved["model"].items() if ".layers.1." not in name}
    torch.save(saved, first)
    with pytest.raises(CorruptCheckpoint, match="hold 3 layers of 4"):
        open_checkpoint(tmp_path)


def test_distributed_optimizers_in_several_buckets_are_refused(tmp_path: Path) -> None:
    folder = write(Job(Model(layers=2), optimizer="distributed"), tmp_path) / "mp_rank_00"
    saved = torch.load(folder / "distrib_optim.pt", weights_only=False)
    (vectors,) = saved[0].values()
    vectors["numel_unpadded"] -= 8
    torch.save(saved, folder / "distrib_optim.pt")
    with pytest.raises(CorruptCheckpoint, match=r"distrib_optim\.pt is corrupt: .* are in several buckets"):
        open_checkpoint(tmp_path)
    torch.save({0: {}}, folder / "distrib_optim.pt")
    with pytest.raises(CorruptCheckpoint, match="keeps every bucket on its own"):
        open_checkpoint(tmp_path)


def test_a_parameter_that_one_rank_lacks(tmp_path: Path) -> None:
    def lack(saved: dict[str, Any]) -> None:
        del saved["model"]["decoder.final_layernorm.bias"]

    job = Job(Model(layers=2), tensor=2, optimizer="none")
    with pytest.raises(CorruptCheckpoint, match=r"mp_rank_01/.* at tensor decoder\.final_layernorm\.bias: it lacks it"):
        open_checkpoint(damaged(tmp_path, lack, job))


def test_ranks_with_unequal_parts(tmp_path: Path) -> None:
    def widen(saved: dict[str, Any]) -> None:
        saved["model"]["decoder.layers.0.self_attention.linear_proj.weight"] = torch.zeros(8, 6, dtype=torch.bfloat16)

    job = Job(Model(layers=1), tensor=2, optimizer="none")
    with pytest.raises(CorruptCheckpoint, match=r"linear_proj\.weight: it is \[8, 4\] and \[8, 6\] on ranks of one"):
        open_checkpoint(damaged(tmp_path, widen, job))


def test_distributed_optimizers_without_a_group_for_a_parameter(tmp_path: Path) -> None:
    def drop(saved: dict[str, Any]) -> None:
        saved["optimizer"]["optimizer"]["param_groups"][0]["is_expert_parallel"] = True

    job = Job(Model(layers=2), tensor=2, optimizer="distributed")
    with pytest.raises(
        CorruptCheckpoint, match=r"at tensor embedding\.word_embeddings\.weight: .* has no group for it"
    ):
        open_checkpoint(damaged(tmp_path, drop, job))
