"""Pipeline and tensor parallelism, as Megatron-DeepSpeed shards a transformer.

How a parameter is cut over tensor-parallel ranks is a `Rule` of this module; `universal_checkpoint_info` says the same
to DeepSpeed in its own words. The whole tensors are merged here by rule and from memory: no reader had a part in them.
Every rule is first tried on the initial weights, whose whole is known.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import distributed as dist
from torch import nn
from torch.nn import functional

from tests.peers.cases import Run
from tests.peers.deepspeed_live import Snapshot, snapshot

WIDTH, HEAD, VOCABULARY, PADDED_VOCABULARY = 10, 2, 43, 48
MICRO_BATCHES = 2


@dataclass(frozen=True)
class Rule:
    """How a whole tensor is cut: `parts` has, per sub-parameter along `dim`, the width on each rank."""

    kind: str
    shape: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...] = ()
    dim: int = 0

    def shard(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        if not self.parts:
            return whole
        subs = whole.split([sum(widths) for widths in self.parts], self.dim)
        cut = [sub.split(list(widths), self.dim)[rank] for sub, widths in zip(subs, self.parts, strict=True)]
        return torch.cat(cut, self.dim)

    def merge(self, shards: list[torch.Tensor]) -> torch.Tensor:
        if self.kind == "average":
            return sum(shards[1:], shards[0]) / len(shards)
        if not self.parts:
            if not all(torch.equal(shards[0], other) for other in shards):
                raise AssertionError("ranks disagree about a replicated parameter")
            return shards[0]
        pieces = [shard.split([widths[rank] for widths in self.parts], self.dim) for rank, shard in enumerate(shards)]
        whole = torch.cat(
            [torch.cat([of[part] for of in pieces], self.dim) for part in range(len(self.parts))], self.dim
        )
        return whole[:VOCABULARY] if self.kind == "vocabulary" else whole


@dataclass(frozen=True)
class Widths:
    """Per rank, of everything that is cut."""

    vocabulary: tuple[int, ...]
    query: tuple[int, ...]
    key: tuple[int, ...]
    hidden: tuple[int, ...]
    projection: tuple[int, ...]

    @staticmethod
    def of(run: Run) -> Widths:
        if run.variant == "uneven":
            return Widths((25, 23), (8, 4), (4, 2), (11, 7), (16, 14))
        query, key = (8, 8) if run.variant == "legacy" else (12, 6)
        even = (tuple([size // run.tp] * run.tp) for size in (PADDED_VOCABULARY, query, key, 18, 30))
        return Widths(*even)


def rules(widths: Widths) -> dict[str, Rule]:
    """Pattern of a parameter's name -> its rule. Exactly one matches."""
    qkv = (widths.query, widths.key, widths.key)
    rows, both, columns = sum(map(sum, qkv)), (widths.hidden, widths.hidden), (widths.projection,)
    return {
        r".*embed\.weight": Rule("vocabulary", (PADDED_VOCABULARY, WIDTH), (widths.vocabulary,)),
        r".*(input|post|final)_norm\.(weight|bias)": Rule("replicated", (WIDTH,)),
        r".*qkv\.weight": Rule("sub", (rows, WIDTH), qkv),
        r".*qkv\.bias": Rule("sub", (rows,), qkv),
        r".*q_norm\.weight": Rule("average", (HEAD,)),
        r".*out\.weight": Rule("row", (WIDTH, sum(widths.query)), (widths.query,), 1),
        r".*out\.bias": Rule("replicated", (WIDTH,)),
        r".*up\.weight": Rule("two", (2 * sum(widths.hidden), WIDTH), both),
        r".*up\.bias": Rule("two", (2 * sum(widths.hidden),), both),
        r".*down\.weight": Rule("row", (WIDTH, sum(widths.hidden)), (widths.hidden,), 1),
        r".*down\.bias": Rule("replicated", (WIDTH,)),
        r".*proj\.weight": Rule("column", (sum(widths.projection), WIDTH), columns),
    }


def rule_of(name: str, widths: Widths) -> Rule:
    (found,) = [rule for pattern, rule in rules(widths).items() if re.fullmatch(pattern, name)]
    return found


def universal_checkpoint_info(run: Run, widths: Widths) -> dict[str, Any]:
    """The rules in DeepSpeed's words, which Megatron-DeepSpeed puts into the client state."""
    given = rules(widths)
    by_kind: Callable[[str], list[str]] = lambda kind: [p for p, rule in given.items() if rule.kind == kind]  # noqa: E731
    legacy = run.variant == "legacy"
    subs = {pattern: given[pattern] for pattern in by_kind("sub")}
    info: dict[str, Any] = {
        "universal_checkpoint_version": 0.3 if legacy else 0.4,
        "original_vocab_size": VOCABULARY,
        "padded_vocab_size": PADDED_VOCABULARY,
        "vocabulary_parameter_patterns": by_kind("vocabulary"),
        "pipeline_replicated_parameter_patterns": [r"tied_modules\..*"] if run.pp > 1 else [],
        "tp_replicated_parameter_patterns": by_kind("replicated"),
        "parameter_to_average_patterns": by_kind("average"),
        "parameter_with_row_parallelism_patterns": by_kind("row"),
        "parameter_with_2_sub_params_cat_dim_0": by_kind("two"),
        "parameter_with_sub_params": [
            {
                "patterns": [pattern],
                "shape": ((len(rule.parts) if legacy else tuple(map(sum, rule.parts))), *rule.shape[1:]),
                "partition_dim": 0,
            }
            for pattern, rule in subs.items()
        ],
    }
    if not legacy:
        info["sub_param_shard_widths"] = {p: [list(part) for part in rule.parts] for p, rule in subs.items()}
    return info


@dataclass(frozen=True)
class Shard:
    """Which tensor-parallel rank this process is, and with whom."""

    rank: int
    group: Any
    widths: Widths


class _Copy(torch.autograd.Function):
    """Forward as it is; gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    """Summed over the ranks; gradients as they are."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class _Gather(torch.autograd.Function):
    """The last dimension put together from ranks of any width; gradients are cut again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, widths: tuple[int, ...], rank: int) -> torch.Tensor:
        ctx.cut = (sum(widths[:rank]), widths[rank])
        whole = x.new_zeros((*x.shape[:-1], sum(widths)))
        whole.narrow(-1, *ctx.cut).copy_(x)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient.narrow(-1, *ctx.cut).contiguous(), None, None, None


class Embedding(nn.Module):
    """A vocabulary-parallel embedding, its rows padded; `logits` uses the same weight the other way round."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        rows = shard.widths.vocabulary
        self.first = sum(rows[: shard.rank])
        self.weight = nn.Parameter(torch.empty(rows[shard.rank], WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        local = tokens - self.first
        mine = (local >= 0) & (local < self.weight.shape[0])
        found = functional.embedding(local.clamp(0, self.weight.shape[0] - 1), self.weight)
        return _Sum.apply(found * mine.unsqueeze(-1), self.shard.group)


def logits(embedding: Embedding, x: torch.Tensor) -> torch.Tensor:
    shard = embedding.shard
    local = functional.linear(_Copy.apply(x, shard.group), embedding.weight)
    return _Gather.apply(local, shard.group, shard.widths.vocabulary, shard.rank)


class Block(nn.Module):
    """Fused queries, keys and values of different sizes, a norm of local heads, SwiGLU, rows, columns."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.shard, widths, rank = shard, shard.widths, shard.rank
        self.query, self.key, hidden = widths.query[rank], widths.key[rank], widths.hidden[rank]
        self.input_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, self.query + 2 * self.key)
        self.q_norm = nn.LayerNorm(HEAD, bias=False)
        self.out = nn.Linear(self.query, WIDTH)
        self.post_norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * hidden)
        self.down = nn.Linear(hidden, WIDTH)
        self.proj = nn.Linear(WIDTH, widths.projection[rank], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.shard.group
        q, k, v = self.qkv(_Copy.apply(self.input_norm(x), group)).split([self.query, self.key, self.key], -1)
        q = (q.unflatten(-1, (-1, HEAD)) * self.q_norm.weight).flatten(-2)
        mixed = q * (torch.cat([k, v], -1) if self.key < self.query else k + v)
        x = x + _Sum.apply(functional.linear(mixed, self.out.weight), group) + self.out.bias
        gate, up = self.up(_Copy.apply(self.post_norm(x), group)).chunk(2, -1)
        x = x + _Sum.apply(functional.linear(functional.silu(gate) * up, self.down.weight), group) + self.down.bias
        wide = _Gather.apply(self.proj(_Copy.apply(x, group)), group, self.shard.widths.projection, self.shard.rank)
        return x + wide.unflatten(-1, (-1, WIDTH)).mean(-2)


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.final_norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.final_norm(x)


def loss(found: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(found.float(), targets)


class TensorParallel(nn.Module):
    """The same layers without a pipeline."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.embed = Embedding(shard)
        self.blocks = nn.ModuleList([Block(shard), Block(shard)])
        self.last = Last()

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return loss(logits(self.embed, self.last(x)), targets)


def pipeline(shard: Shard, topology: Any) -> PipelineModule:
    layers = [
        TiedLayerSpec("embed", Embedding, shard, tied_weight_attr="weight"),
        LayerSpec(Block, shard),
        lambda x: x * 0.5,
        LayerSpec(Block, shard),
        LayerSpec(Block, shard),
        LayerSpec(Last),
        TiedLayerSpec("embed", Embedding, shard, forward_fn=logits, tied_weight_attr="weight"),
    ]
    return PipelineModule(layers=layers, loss_fn=loss, topology=topology, partition_method="uniform")


def initialise(model: nn.Module, shard: Shard) -> None:
    """Give every rank its shard of known whole tensors, and try the rules on them."""
    for name, parameter in model.named_parameters():
        rule = rule_of(name, shard.widths)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = 0.3 * torch.randn(rule.shape, generator=generator)
        if name.endswith("norm.weight"):
            whole += 1
        shards = [rule.shard(whole, rank) for rank in range(len(shard.widths.query))]
        kept = whole[:VOCABULARY] if rule.kind == "vocabulary" else whole
        torch.testing.assert_close(rule.merge(shards), kept, rtol=1e-6 if rule.kind == "average" else 0, atol=0)
        parameter.data.copy_(shards[shard.rank])
        parameter.tensor_model_parallel = bool(
            rule.parts
        )  # Megatron's mark: DeepSpeed's norms count the rest only once


def batches(data_rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(data_rank)
    while True:
        tokens = torch.randint(0, VOCABULARY, (2, 4), generator=generator)
        yield tokens[0], tokens[1]


def make(
    run: Run, given: dict[str, Any], checkpoint: Path, tag: str, client: dict[str, Any]
) -> tuple[Any, Snapshot, dict[str, Any]]:
    """Train and save; rank 0 gets the whole state."""
    topology = PipeModelDataParallelTopology(num_pp=run.pp, num_mp=run.tp, num_dp=run.world // (run.pp * run.tp))
    grid = PipelineParallelGrid(topology=topology)
    shard = Shard(grid.get_slice_parallel_rank(), grid.slice_proc_group, Widths.of(run))
    model = TensorParallel(shard) if run.pp == 1 else pipeline(shard, topology)
    initialise(model, shard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.97), weight_decay=0.1)
    given |= {"gradient_accumulation_steps": MICRO_BATCHES}
    start = partial(deepspeed.initialize, model=model, optimizer=optimizer, config=given, dist_init_required=False)
    source = batches(grid.get_data_parallel_rank())
    engine, *_ = start() if run.pp > 1 else start(mpu=grid)
    for _ in range(run.steps):
        if run.pp > 1:
            engine.train_batch(data_iter=source)
            continue
        for _ in range(MICRO_BATCHES):
            engine.backward(engine(*next(source)))
            engine.step()
    mine = snapshot(engine)
    client["universal_checkpoint_info"] = universal_checkpoint_info(run, shard.widths)
    engine.save_checkpoint(str(checkpoint), tag=tag, client_state=client)
    place = (grid.get_stage_id(), shard.rank, grid.get_data_parallel_rank())
    gathered: list[Any] = [None] * run.world
    dist.all_gather_object(gathered, (place, mine))
    live = _whole(dict(gathered), shard.widths)
    hyper = {key: value for key, value in engine.optimizer.param_groups[0].items() if key != "params"}
    names = [key.removeprefix("master/") for key in live.tensors if key.startswith("master/")]
    known = {
        "about": run.about,
        "tag": tag,
        "world": run.world,
        "optimizer": type(engine.optimizer).__name__,
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "scalars": live.scalars,
        "groups": [{"names": names, "hyper": hyper}],
        "aliases": {},
        "averaged": [name for name in names if rule_of(name, shard.widths).kind == "average"],
        "client_state": {key: value for key, value in client.items() if key not in {"options"}},
    }
    return engine, live, known


def _whole(places: dict[tuple[int, int, int], Snapshot], widths: Widths) -> Snapshot:
    """Stages put beside each other, tensor-parallel shards merged by rule; what is held twice must be the same."""
    found = Snapshot()
    for stage in sorted({stage for stage, _, _ in places}):
        of_stage = [places[stage, rank, 0] for rank in range(len(widths.query))]
        for key in of_stage[0].tensors:
            name = key.rpartition("/")[2]
            shards = [snapshot.tensors[key] for snapshot in of_stage]
            merged = rule_of(name, widths).merge(shards).contiguous().clone()
            if key in found.tensors and not torch.equal(found.tensors[key], merged):
                raise AssertionError(f"{key}: stages disagree")
            found.tensors[key] = merged
        for kind, values in of_stage[0].scalars.items():
            found.scalars.setdefault(kind, {}).update(values)
    return found
