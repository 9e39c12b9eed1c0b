"""Pipeline stages and tensor-parallel ranks: whole tensors are cut as the rules say, saved, and read back whole."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.language import Fragment, Padding, Replicated, Rule, Rules
from orchestrator.core.errors import CheckpointError
from tests.unit.checkpoint.formats.deepspeed_writer import Layout, Model, contents, deepspeed_names
from tests.unit.checkpoint.formats.test_deepspeed_zero import assert_holds, data_of, raw

Cut = Callable[[torch.Tensor, int], list[torch.Tensor]]

INFO: dict[str, Any] = {
    "universal_checkpoint_version": 0.4,
    "original_vocab_size": 11,
    "padded_vocab_size": 12,
    "vocabulary_parameter_patterns": [r"tied_modules.embed.word_embeddings.weight"],
    "tp_replicated_parameter_patterns": [r"\d+\.norm\.weight", r"\d+\.dense\.bias"],
    "parameter_to_average_patterns": [r"\d+\.q_norm\.weight"],
    "parameter_with_row_parallelism_patterns": [r"\d+\.dense\.weight"],
    "parameter_with_2_sub_params_cat_dim_0": [r"\d+\.up\.weight"],
    "parameter_with_sub_params": [{"patterns": [r"\d+\.qkv\.weight"], "shape": ((8, 4, 4), -1), "partition_dim": 0}],
    "sub_param_shard_widths": {r"\d+\.qkv\.weight": [[6, 2], [2, 2], [2, 2]]},
}


def columns(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    return list(torch.tensor_split(whole, ranks, dim=0))


def rows(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    return list(torch.tensor_split(whole, ranks, dim=1))


def same(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    return [whole] * ranks


def halves(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    gate, up = (torch.tensor_split(half, ranks) for half in whole.chunk(2))
    return [torch.cat(pair) for pair in zip(gate, up, strict=True)]


def fused(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """8 + 4 + 4 rows of q, k and v; with two ranks the first has 6 + 2 + 2 of them."""
    if ranks == 1:
        return [whole]
    q, k, v = whole.split((8, 4, 4))
    return [torch.cat((q[:6], k[:2], v[:2])), torch.cat((q[6:], k[2:], v[2:]))]


def around(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Copies whose mean is the whole."""
    if ranks == 1:
        return [whole]
    return [whole - 0.5, whole + 0.5]


LAYER: dict[str, tuple[tuple[int, ...], Cut]] = {
    "norm.weight": ((6,), same),
    "q_norm.weight": ((4,), around),
    "qkv.weight": ((16, 6), fused),
    "dense.weight": ((6, 8), rows),
    "dense.bias": ((6,), same),
    "up.weight": ((10 * 2, 6), halves),
    "column.weight": ((7, 6), columns),
}
EMBEDDING = "tied_modules.embed.word_embeddings.weight"
Cuts = dict[str, list[torch.Tensor]]


class Run:
    """Two layers (1 and 2) between an embedding (layer 0) and the head that is tied to it (layer 3)."""

    def __init__(self, stages: int, ranks: int, vocabulary: int = 11) -> None:
        self.stages, self.ranks = stages, ranks
        generator = torch.Generator().manual_seed(stages * 10 + ranks)
        self.whole: dict[str, torch.Tensor] = {}
        self.cuts: dict[str, Cuts] = {}
        for state in ("", ".exp_avg", ".exp_avg_sq"):
            embedding = torch.randint(-99, 99, (12, 6), generator=generator) / 4
            self.whole[EMBEDDING + state] = embedding[:vocabulary]
            cuts = {EMBEDDING: columns(embedding, ranks)}
            for layer in (1, 2):
                for name, (shape, cut) in LAYER.items():
                    whole = torch.randint(-99, 99, shape, generator=generator) / 4
                    self.whole[f"{layer}.{name}{state}"] = whole
                    cuts[f"{layer}.{name}"] = cut(whole, ranks)
            self.cuts[state.removeprefix(".")] = cuts
        self.buffer = torch.arange(3.0)

    def names(self, stage: int) -> list[str]:
        layers = (1, 2) if self.stages == 1 else (1,) if stage == 0 else (2,)
        return [EMBEDDING, *(f"{layer}.{name}" for layer in layers for name in LAYER)]

    def save(self, root: Path, *, world: int = 2, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Path:
        folder = root / "step"
        folder.mkdir(parents=True)
        (root / "latest").write_text("step")
        for stage in range(self.stages):
            for rank in range(self.ranks):
                self._save_rank(folder, stage, rank, world, dtype, more)
        return folder

    def _save_rank(self, folder: Path, stage: int, rank: int, world: int, dtype: torch.dtype, more: Any) -> None:
        def cut(state: str, names: list[str]) -> dict[str, torch.Tensor]:
            return {name: self.cuts[state][name][rank].contiguous() for name in names}

        names = self.names(stage)
        hyper = [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.2}]
        groups = [cut("", names[1:]), cut("", names[:1])]
        states = {state: cut(state, names) for state in ("exp_avg", "exp_avg_sq")}
        client = {"module": None, "buffer_names": ["1.positions"] if stage == 0 else [], **more}
        made = Model(groups, states, dtype, hyper=hyper, client=client)
        layout = Layout(1, world, mp=stage * self.ranks + rank)
        layers = {0: {"word_embeddings.weight": self.cuts[""][EMBEDDING][rank]}}
        for name in names[1:]:
            layer, _, local = name.partition(".")
            layers.setdefault(int(layer), {})[local] = self.cuts[""][name][rank]
        layers.setdefault(1, {})["positions"] = self.buffer
        layers[3] = layers[0]
        with deepspeed_names():
            for file, content in contents(made, layout).items():
                if content.get("module", 1) is not None:
                    content.update(client if "param_shapes" in content else {})
                torch.save(content, folder / file)
            for layer, tensors in layers.items():
                if str(layer) + ".norm.weight" in names or layer == 3 * (stage == self.stages - 1):
                    suffix = f"-model_{rank:02d}" if self.ranks > 1 else ""
                    low = OrderedDict((k, v.to(dtype) if k != "positions" else v) for k, v in tensors.items())
                    torch.save(low, folder / f"layer_{layer:02d}{suffix}-model_states.pt")
                    if layer in (0, 3):
                        torch.save(low, folder / f"layer_00{suffix}-model_states.pt")

    def expected(self) -> dict[str, torch.Tensor]:
        steps = {f"{name}.step": torch.tensor(3.0) for name in self.cuts[""]}
        return self.whole | steps | {"1.positions": self.buffer}


def dimensions(run: Run) -> dict[str, int]:
    return {"pp_degree": run.stages, "tp_degree": run.ranks}


@pytest.mark.parametrize("said", [True, False], ids=["said", "derived"])
@pytest.mark.parametrize(("stages", "ranks"), [(1, 2), (2, 1), (2, 2)])
def test_any_mesh_reads_back_whole(tmp_path: Path, stages: int, ranks: int, said: bool) -> None:
    run = Run(stages, ranks)
    info = INFO if ranks == 2 else {**INFO, "sub_param_shard_widths": {r"\d+\.qkv\.weight": [[8], [4], [4]]}}
    more = {"checkpoint_parallel_dimensions": dimensions(run)} if said else {}
    run.save(tmp_path, universal_checkpoint_info=info, **more)
    view = open_checkpoint(tmp_path, source="deepspeed")
    assert_holds(view, run.expected())
    assert view.training_dtypes == dict.fromkeys(run.cuts[""], "BF16")
    assert view.state["param_groups"] == [
        {"lr": 0.1, "params": [name for name in run.cuts[""] if name != EMBEDDING]},
        {"lr": 0.1, "weight_decay": 0.2, "params": [EMBEDDING]},
    ]
    assert view.tensors["1.positions"].kind == "buffer"
    assert len(view.tensors[EMBEDDING].others) == stages - 1


def test_equal_copies_can_be_compared(tmp_path: Path) -> None:
    run = Run(2, 2)
    run.save(tmp_path, universal_checkpoint_info=INFO)
    view = open_checkpoint(tmp_path)
    assert len(view.tensors["1.norm.weight"].others) == 1
    assert view.tensors["1.q_norm.weight"].average
    assert not view.tensors["1.dense.weight"].others


def test_without_metadata_ranks_are_put_together_along_rows_and_the_reader_is_told(tmp_path: Path) -> None:
    run = Run(1, 2)
    run.save(tmp_path)
    view = open_checkpoint(tmp_path)
    cuts = run.cuts[""]["1.dense.weight"]
    assert data_of(view, "1.dense.weight") == raw(torch.cat(cuts))
    assert "has no universal_checkpoint_info" in view.notes[0]
    assert "1.positions" in view.notes[1]


def test_the_user_s_rules_stand_in_for_metadata(tmp_path: Path) -> None:
    run = Run(1, 2)
    run.save(tmp_path)
    rules = Rules(
        "mine",
        (
            Rule(r".*word_embeddings\.weight", Fragment(0), Padding(11)),
            Rule(r".*(norm\.weight|bias|positions)", Replicated()),
            Rule(r".*dense\.weight", Fragment(1)),
            Rule(r".*up\.weight", Fragment(0, count=2)),
            Rule(r".*qkv\.weight", Fragment(0, (8, 4, 4), widths=((6, 2), (2, 2), (2, 2)))),
            Rule(r".*column\.weight", Fragment(0)),
        ),
    )
    view = open_checkpoint(tmp_path, rules=rules)
    averaged = {name for name in run.whole if "q_norm" in name}
    for name in run.whole.keys() - averaged:
        assert data_of(view, name) == raw(run.whole[name]), name
    with pytest.raises(CheckpointError, match=r"column\.weight is matched by none"):
        open_checkpoint(tmp_path, rules=Rules("short", rules.rules[:-1]))


def test_metadata_before_widths_shares_fused_parts_evenly(tmp_path: Path) -> None:
    run = Run(1, 2)
    for state, cuts in run.cuts.items():
        for layer in (1, 2):
            whole = run.whole[f"{layer}.qkv.weight" + (f".{state}" if state else "")]
            q, k, v = whole.split((8, 4, 4))
            cuts[f"{layer}.qkv.weight"] = [torch.cat((q[:4], k[:2], v[:2])), torch.cat((q[4:], k[2:], v[2:]))]
    info = {**INFO, "universal_checkpoint_version": 0.3}
    del info["sub_param_shard_widths"]
    run.save(tmp_path, universal_checkpoint_info=info)
    assert_holds(open_checkpoint(tmp_path), run.expected())


def block(shape: tuple[int, ...], source: Any, dest: Any, ranks: tuple[int, ...], **more: Any) -> dict[str, Any]:
    return {"shape": list(shape), "source": source, "dest": dest, "locations": list(ranks), **more}


def geometric() -> dict[str, Any]:
    """Maps for a row-parallel, a column-parallel and a replicated parameter, and the vocabulary."""

    def ranks(shard: tuple[int, ...], *pieces: list[dict[str, Any]]) -> dict[int, Any]:
        return {rank: {"shard_shape": list(shard), "pieces": found} for rank, found in enumerate(pieces)}

    dense = [[block((6, 4), [4 * rank, [8, 1]], [0, [4, 1]], (rank,))] for rank in (0, 1)]
    up = [
        [block((5, 6), [half * 60 + rank * 30, [6, 1]], [half * 30, [6, 1]], (rank,)) for half in (0, 1)]
        for rank in (0, 1)
    ]
    norm = [[block((6,), [0, [1]], [0, [1]], (0, 1))] for _ in (0, 1)]
    words = [[block((6, 6), [36 * rank, [6, 1]], [0, [6, 1]], (rank,))] for rank in (0, 1)]
    return {
        "version": 1,
        "params": {
            r"\d+\.dense\.weight": {"logical_shape": [6, 8], "ranks": ranks((6, 4), *dense)},
            r"\d+\.up\.weight": {"logical_shape": [20, 6], "ranks": ranks((10, 6), *up)},
            r"\d+\.norm\.weight": {"logical_shape": [6], "ranks": ranks((6,), *norm)},
            r"tied_modules.*": {"logical_shape": [12, 6], "ranks": ranks((6, 6), *words)},
        },
    }


def test_a_geometric_map_goes_before_the_lists(tmp_path: Path) -> None:
    run = Run(2, 2)
    wrong = {"parameter_with_2_sub_params_cat_dim_0": [], "parameter_with_row_parallelism_patterns": []}
    run.save(tmp_path, universal_checkpoint_info={**INFO, **wrong, "affine_map": geometric()})
    view = open_checkpoint(tmp_path)
    assert_holds(view, run.expected())
    assert view.tensors["1.dense.weight"].rule == "blocks of a geometric map"


AFFINE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "version": (lambda found: found.update(version=2), "is 2, later than 1"),
    "scale": (lambda found: piece(found).update(scale=0.5), "scaled on some ranks are not read"),
    "hole": (lambda found: piece(found).update(source=[4, [8, 1]]), "does not tile the tensor"),
    "stride": (lambda found: piece(found).update(source=[0, [9, 1]]), "is no box of"),
    "outside": (lambda found: piece(found).update(source=[5, [8, 1]]), "is no box of"),
    "elements": (lambda found: piece(found).update(shape=[6, 3]), "pieces of other elements than its shard"),
    "place": (lambda found: piece(found).update(locations=[1]), "is not on rank 0"),
    "rank": (lambda found: dense(found)["ranks"].pop(1), "lacks tensor-parallel rank 1"),
    "shard": (lambda found: dense(found)["ranks"][0].update(shard_shape=[4, 6]), "is no box of"),
    "junk": (lambda found: dense(found).update(ranks=7), "mapping is expected"),
}


def dense(found: Any) -> Any:
    return found["params"][r"\d+\.dense\.weight"]


def piece(found: Any) -> Any:
    return dense(found)["ranks"][0]["pieces"][0]


@pytest.mark.parametrize("case", AFFINE)
def test_a_geometric_map_that_does_not_fit_is_named(tmp_path: Path, case: str) -> None:
    found = geometric()
    AFFINE[case][0](found)
    Run(1, 2).save(tmp_path, universal_checkpoint_info={**INFO, "affine_map": found})
    with pytest.raises(CheckpointError, match=AFFINE[case][1]):
        open_checkpoint(tmp_path)


def test_a_rank_may_hold_nothing_of_a_parameter(tmp_path: Path) -> None:
    run = Run(1, 2)
    for state, cuts in run.cuts.items():
        whole = run.whole["1.column.weight" + (f".{state}" if state else "")]
        cuts["1.column.weight"] = [whole[:0], whole]  # not trained by DeepSpeed, and saved with the module
    folder = run.save(tmp_path, universal_checkpoint_info=INFO)
    with deepspeed_names():
        for file in folder.glob("*_mp_rank_00_*.pt"):
            content = torch.load(file, weights_only=False)
            for mapping in content.get("optimizer_state_dict", {}).get("param_slice_mappings", []):
                mapping.pop("1.column.weight", None)
            torch.save(content, file)
        model_file = folder / "mp_rank_00_model_states.pt"
        content = torch.load(model_file, weights_only=False)
        del content["param_shapes"][0]["1.column.weight"]
        torch.save(content, model_file)
    assert_holds(open_checkpoint(tmp_path), run.expected())


@pytest.mark.parametrize("stages", [1, 2])
def test_slices_name_the_parameters_where_no_shapes_do(tmp_path: Path, stages: int) -> None:
    """The BF16 optimizer of a pipeline without ZeRO saves its slices, but no `param_shapes`."""
    run = Run(stages, 2)
    folder = run.save(tmp_path, universal_checkpoint_info=INFO)
    with deepspeed_names():
        for file in folder.glob("mp_rank_*.pt"):
            torch.save(torch.load(file, weights_only=False) | {"param_shapes": None}, file)
    assert_holds(open_checkpoint(tmp_path), run.expected())


BAD = {
    "several": ({"tp_replicated_parameter_patterns": [r"1\.norm.*", r".*norm\.weight"]}, "several patterns"),
    "expression": ({"tp_replicated_parameter_patterns": ["("]}, "not a regular expression"),
    "slow": ({"tp_replicated_parameter_patterns": ["(a+)+$"]}, "may take for ever"),
    "number": ({"tp_replicated_parameter_patterns": [5]}, "name pattern is expected"),
    "vocabulary": ({"original_vocab_size": None}, "original_vocab_size"),
    "widths": ({"sub_param_shard_widths": {r"\d+\.qkv\.weight": [[6, 2], [2, 2], [2, 1]]}}, "does not share parts"),
    "no widths": ({"sub_param_shard_widths": {}}, "lacks"),
    "parts": (
        {"parameter_with_sub_params": [{"patterns": ["x"], "shape": (3, -1), "partition_dim": 7}]},
        "dimension 7",
    ),
    "unsupported": ({"autotp_unsupported_parameter_patterns": {"x": "why"}}, "cannot be put together"),
    "row": ({"parameter_with_row_parallelism_patterns": [".*column.*", ".*dense.weight", ".*x"]}, "column.weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_metadata_that_does_not_fit_is_named(tmp_path: Path, case: str) -> None:
    run = Run(1, 2)
    run.save(tmp_path, universal_checkpoint_info={**INFO, **BAD[case][0]})
    with pytest.raises(CheckpointError, match=BAD[case][1]):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["layer_01-model_01-model_states.pt", "mp_rank_01_model_states.pt"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    folder = Run(2, 2).save(tmp_path, universal_checkpoint_info=INFO)
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} is corrupt: it is missing"):
        open_checkpoint(tmp_path)


def test_a_layer_without_any_file_is_missed(tmp_path: Path) -> None:
    folder = Run(2, 1).save(tmp_path, universal_checkpoint_info=None)
    (folder / "layer_02-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"layer_02.*it is missing"):
        open_checkpoint(tmp_path)


def test_tensor_parallel_ranks_under_zero_3(tmp_path: Path) -> None:
    run = Run(1, 2)
    folder = tmp_path / "step"
    folder.mkdir()
    names = run.names(0)
    frozen = torch.randn(4, 3)
    for rank in (0, 1):

        def cut(state: str, rank: int = rank) -> dict[str, torch.Tensor]:
            return {name: run.cuts[state][name][rank].contiguous() for name in names}

        states = {state: cut(state) for state in ("exp_avg", "exp_avg_sq")}
        made = Model([cut("")], states, torch.bfloat16, info=INFO, frozen={"9.frozen": frozen[2 * rank : 2 * rank + 2]})
        made.aliases = {"head.weight": EMBEDDING} if rank == 0 else {}
        made.buffers = {"1.positions": run.buffer}
        with deepspeed_names():
            for file, content in contents(made, Layout(3, 3, sub_group=20, mp=rank)).items():
                torch.save(content, folder / file)
    view = open_checkpoint(tmp_path)
    assert_holds(view, run.expected() | {"9.frozen": frozen})
    assert (view.source, view.aliases, view.frozen) == ("deepspeed zero 3", {"head.weight": EMBEDDING}, {"9.frozen"})
