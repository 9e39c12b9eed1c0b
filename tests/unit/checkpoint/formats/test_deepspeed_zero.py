"""Flat ZeRO vectors of any shapes, groups, ranks and paddings read back as the bytes that were flattened."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.reshard import flaw
from orchestrator.checkpoint.view import UniversalView
from tests.unit.checkpoint.formats.deepspeed_writer import (
    Layout,
    Model,
    ZeroStageEnum,
    deepspeed_names,
    model,
    optimizer_name,
    save,
)

SHAPE = st.lists(st.integers(1, 5), max_size=4).map(tuple)
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def data_of(view: UniversalView, name: str) -> bytes:
    tensor = view.tensors[name]
    out = bytearray(tensor.size_bytes)
    view.read(name, Box.whole(tensor.shape), out)
    return bytes(out)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_holds(view: UniversalView, expected: dict[str, torch.Tensor]) -> None:
    assert set(view.tensors) == set(expected)
    for name, tensor in expected.items():
        found = view.tensors[name]
        assert (found.shape, found.dtype) == (tuple(tensor.shape), DTYPES[tensor.dtype]), name
        assert flaw(found.shape, [chunk.box for chunk in found.chunks]) is None, name
        assert data_of(view, name) == raw(tensor), name


@st.composite
def groups(draw: st.DrawFn) -> list[list[tuple[str, tuple[int, ...]]]]:
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return [[(f"g{group}.p{index}", draw(SHAPE)) for index in range(count)] for group, count in enumerate(counts)]


layouts12 = st.builds(
    Layout,
    stage=st.sampled_from([1, 2]),
    world=st.integers(1, 5),
    style=st.sampled_from(["zero", "bf16", "elastic", "old"]),
    round_robin=st.booleans(),
    alignment=st.sampled_from([1, 4]),
)
layouts3 = st.builds(Layout, stage=st.just(3), world=st.integers(1, 5), sub_group=st.integers(1, 60))


@settings(deadline=None, max_examples=40)
@given(groups(), st.one_of(layouts12, layouts3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_layout_reads_back_the_same_bytes(shapes: Any, layout: Layout, dtype: torch.dtype) -> None:
    made = model(shapes, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), made, layout)
        view = open_checkpoint(folder, source="deepspeed")
        assert_holds(view, made.expected())
        assert view.training_dtypes == ({} if dtype == torch.float32 else dict.fromkeys(made.masters, "BF16"))
        assert [sorted(group["params"]) for group in view.state["param_groups"]] == [sorted(g) for g in made.groups]
        assert view.frozen == frozenset()


EVERY = [Layout(1, 3), Layout(2, 3), Layout(1, 3, "bf16"), Layout(3, 3), Layout(3, 3, sub_group=5)]


def rich(dtype: torch.dtype = torch.bfloat16) -> Model:
    """Groups of very different sizes, frozen parameters, buffers, tied names."""
    return model(
        [[("a.weight", (5, 7)), ("a.bias", (7,))], [("scale", (1,))], [("b.weight", (4, 3, 2))]],
        dtype=dtype,
        frozen={"f.weight": torch.randn(3, 5).to(dtype), "f.bias": torch.randn(2).to(dtype)},
        buffers={"n.mean": torch.randn(4), "n.count": torch.tensor(9)},
        aliases={"head.weight": "a.weight"},
    )


@pytest.mark.parametrize("layout", EVERY, ids=str)
def test_what_is_not_trained_is_there_and_tied_names_are_names_only(tmp_path: Path, layout: Layout) -> None:
    made = rich()
    save(tmp_path, made, layout)
    view = open_checkpoint(tmp_path, source="deepspeed")
    assert_holds(view, made.expected())
    assert view.aliases == {"head.weight": "a.weight"}
    assert view.frozen == {"f.weight", "f.bias"}
    assert {name for name, one in view.tensors.items() if one.kind == "buffer"} == {"n.mean", "n.count"}
    assert view.training_dtypes == dict.fromkeys(made.masters, "BF16")
    assert view.notes == ()


@pytest.mark.parametrize("layout", EVERY, ids=str)
def test_every_group_keeps_its_hyper_parameters(tmp_path: Path, layout: Layout) -> None:
    made = rich()
    save(tmp_path, made, layout)
    view = open_checkpoint(tmp_path)
    assert view.source == f"deepspeed zero {layout.stage}"
    assert view.state["param_groups"] == [
        {"lr": 0.1, "betas": [0.9, 0.95], "params": ["a.weight", "a.bias"]},
        {"lr": 0.05, "betas": [0.9, 0.95], "params": ["scale"]},
        {"lr": 0.1 / 3, "betas": [0.9, 0.95], "params": ["b.weight"]},
    ]
    assert view.step == 3
    assert view.state["lr_scheduler"] == {"last_batch_iteration": 3}


@pytest.mark.parametrize("by_name", [True, False])
def test_the_stage_is_an_enumeration_pickled_by_name_or_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_name: bool
) -> None:
    """By name is how early releases of Python 3.11 do it (3.11.2 for one), by value the others."""

    def reduced(member: ZeroStageEnum, _: int) -> tuple[Any, ...]:
        return (getattr, (ZeroStageEnum, member.name)) if by_name else (ZeroStageEnum, (member.value,))

    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", reduced)
    for layout in (Layout(2, 2), Layout(3, 2)):
        save(tmp_path / str(layout.stage), rich(), layout)
        assert open_checkpoint(tmp_path / str(layout.stage)).source == f"deepspeed zero {layout.stage}"


def test_a_slice_reads_only_its_own_bytes(tmp_path: Path) -> None:
    made = model([[("a", (6, 4)), ("b", (9,))]])
    save(tmp_path, made, Layout(1, 4))
    view = open_checkpoint(tmp_path)
    before = view.files.bytes_read  # type: ignore[attr-defined]
    out = torch.zeros(3, 2)
    view.read("a", Box((1, 1), (3, 2)), out.numpy())
    assert torch.equal(out, made.masters["a"][1:4, 1:3])
    assert view.files.bytes_read - before == 24  # type: ignore[attr-defined]


def test_tied_names_are_found_without_shared_params(tmp_path: Path) -> None:
    made = rich()
    made.client = {"shared_params": None, "checkpoint_parallel_dimensions": None}
    save(tmp_path, made, Layout(1, 2))
    view = open_checkpoint(tmp_path)
    assert view.aliases == {"head.weight": "a.weight"}
    assert_holds(view, made.expected())


def test_parameters_without_elements_are_no_aliases_of_one_another(tmp_path: Path) -> None:
    made = rich()
    made.frozen |= {"none": torch.zeros(0, 3, dtype=made.dtype), "nil": torch.zeros(0, dtype=made.dtype)}
    made.client = {"shared_params": {"nil": "none", **made.aliases}}  # their addresses are both 0
    for layout in (Layout(1, 2), Layout(2, 2)):
        save(tmp_path, made, layout)
        assert_holds(open_checkpoint(tmp_path), made.expected())


@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(3, 2)], ids=str)
def test_other_optimizers_states_have_their_own_names(tmp_path: Path, layout: Layout) -> None:
    made = model([[("a", (3, 2))], [("b", (5,))]], states=("momentum_buffer", "square_avg"))
    made.step = 4
    save(tmp_path, made, layout)
    assert_holds(open_checkpoint(tmp_path), made.expected())


def test_the_step_of_a_fused_optimizer_is_its_group_s(tmp_path: Path) -> None:
    made = model([[("a", (3, 2))], [("b", (5,))]])
    made.step, made.hyper = None, [{"lr": 1.0, "step": 8}, {"lr": 1.0, "step": torch.tensor(8)}]
    for layout in (Layout(1, 2), Layout(3, 2)):
        save(tmp_path, made, layout)
        view = open_checkpoint(tmp_path)
        assert data_of(view, "a.step") == data_of(view, "b.step") == raw(torch.tensor(8.0))


def test_scalars_and_what_is_no_number(tmp_path: Path) -> None:
    made = model([[("a", (3,))]])
    folder = save(tmp_path, made, Layout(1, 1))
    file = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    change(
        file,
        lambda state: state["base_optimizer_state"]["state"][0].update(
            eta=0.1, on=True, count=5, mu=torch.tensor(2.5), rows=torch.zeros(2, 2), none=None, word="x"
        ),
    )
    view = open_checkpoint(tmp_path)
    assert {name: view.tensors[f"a.{name}"].dtype for name in ("eta", "on", "count", "mu")} == {
        "eta": "F64", "on": "BOOL", "count": "I64", "mu": "F64",
    }  # fmt: skip
    assert data_of(view, "a.mu") == torch.tensor(2.5, dtype=torch.float64).numpy().tobytes()
    assert not {"a.rows", "a.none", "a.word"} & set(view.tensors)
    assert [note.split(" is ")[0] for note in view.notes] == [
        "The optimizer's state rows",
        "The optimizer's state word",
    ]


def change(file: Path, edit: Any) -> None:
    """Edit the `optimizer_state_dict` (or the whole) of a file in place."""
    with deepspeed_names():
        content = torch.load(file, weights_only=False)
        edit(content.get("optimizer_state_dict", content))
        torch.save(content, file)


def test_state_is_plain_data(tmp_path: Path) -> None:
    made = model([[("a", (3,))]], client={"iteration": 3, "rng": torch.zeros(5), "args": {"x": (1, 2), 5: None}})
    save(tmp_path, made, Layout(1, 1))
    view = open_checkpoint(tmp_path)
    assert view.state["loss_scaler"] == {"cur_scale": 128.0, "dynamic": False}
    assert view.state["args"] == {"x": [1, 2], "5": None}
    assert (view.state["iteration"], view.state["clip_grad"], "rng" in view.state) == (3, 1.0, False)
    assert view.notes == ("What is not plain data is left out of the state: rng.",)


def test_steps_before_the_first_have_no_states(tmp_path: Path) -> None:
    made = model([[("a", (3,))], [("b", (2,))]], states=())
    made.step = None
    for layout in (Layout(1, 2), Layout(3, 2)):
        save(tmp_path, made, layout)
        assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_momentum_of_whole_parameters_on_every_rank_that_has_a_slice(tmp_path: Path, world: int) -> None:
    """Muon under ZeRO 1 and 2: it needs whole matrices, so that a rank keeps whole ones of what it has a part of."""
    made = model([[("a", (5, 7)), ("b", (7, 5)), ("c", (3, 3))]], states=("momentum_buffer",), step=None)
    layout = Layout(2, world)
    folder = save(tmp_path, made, layout)
    with deepspeed_names():
        for rank in range(world):
            file = folder / optimizer_name(layout, made, rank)
            content = torch.load(file, weights_only=False)
            inside = content["optimizer_state_dict"]
            whole = [made.states["momentum_buffer"][name].flatten() for name in inside["param_slice_mappings"][0]]
            inside["base_optimizer_state"]["state"][0] = {"momentum_buffer": torch.cat(whole).bfloat16()}
            torch.save(content, file)
    view = open_checkpoint(tmp_path)
    for name, momentum in made.states["momentum_buffer"].items():
        assert data_of(view, f"{name}.momentum_buffer") == raw(momentum.bfloat16())


def test_a_parameter_without_elements_is_not_frozen_unless_the_files_say_so(tmp_path: Path) -> None:
    made = model([[("a", (3, 2))]], frozen={"nothing": torch.empty(0, 5)})
    save(tmp_path, made, Layout(1, 2))
    view = open_checkpoint(tmp_path)
    assert view.tensors["nothing"].shape == (0, 5)
    assert not view.frozen
    save(tmp_path, made, Layout(2, 2))
    assert open_checkpoint(tmp_path).frozen == {"nothing"}
