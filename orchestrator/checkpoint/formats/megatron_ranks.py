"""The files of Megatron-LM's ranks: where each is in the grid, its arguments, and its tensors by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from orchestrator.checkpoint.archive import StoredTensor, load_archive
from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.pickled_values import Node
from orchestrator.checkpoint.unpickle import Record
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint

MODEL_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"
_RANK = re.compile(r"mp_rank_(\d{2,6})(?:_(\d{3,6}))?(?:_(\d{3,6}))?")
_LAYER = re.compile(r"(?:.*\.)?(?:encoder|decoder)\.layers\.(\d{1,6})\..*")
_EXPERT = re.compile(r".*\.(?:local_experts\.(\d{1,6})\..*|experts\.linear_fc[12]\.(?:weight|bias)(\d{1,6}))")
_MAX_DEPTH = 20
_SHAPING = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_experts",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
)
"""Arguments that say what the files of ranks make together."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments that Megatron-LM was started with, as the checkpoint keeps them."""

    record: Record | None
    label: str

    def get(self, key: str) -> Any:
        """The argument; None where it is not given."""
        return None if self.record is None else self.record.get(key)

    def count(self, key: str) -> int | None:
        """A whole number; None where it is not given."""
        value = self.get(key)
        if value is None or isinstance(value, bool):
            return None
        return Node(value, self.label, f"args.{key}").count()

    def flag(self, key: str) -> bool:
        """Whether a switch is set."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise Node(value, self.label, f"args.{key}").fail(f"is a {type(value).__name__} where a switch is expected")
        return bool(value)

    def fail(self, reason: str, tensor: str | None = None) -> CorruptCheckpoint:
        """The error to raise where the arguments do not fit the tensors."""
        return corrupt(self.label, f"its args {reason}", tensor)

    @property
    def virtual_stages(self) -> int:
        """Model chunks on each pipeline rank."""
        return self.count("virtual_pipeline_model_parallel_size") or 1


@dataclass(slots=True)
class Rank:
    """What one rank saved."""

    tensor: int
    stage: int
    expert: int
    file: str
    """Its model file."""
    folder: str
    """Its folder, with a `/` at the end."""
    top: Node
    """Everything in its model file."""
    chunks: list[dict[str, StoredTensor]] = field(default_factory=list)
    """Its tensors by their names on the rank, for each virtual stage."""
    layers: list[int] = field(default_factory=list)
    """Transformer layers of each virtual stage."""

    def add(self, chunk: dict[str, StoredTensor]) -> None:
        """Note the tensors of a virtual stage, whose layers must be numbered from 0."""
        found = {int(match[1]) for name in chunk if (match := _LAYER.fullmatch(name))}
        if found != set(range(len(found))):
            raise self.top.fail(f"holds {len(found)} layers of a stage, but not those numbered from 0")
        self.chunks.append(chunk)
        self.layers.append(len(found))

    def experts(self) -> int:
        """Experts of each layer on this rank, which must be numbered from 0."""
        names = (name for chunk in self.chunks for name in chunk)
        found = {int(match[1] or match[2]) for name in names if (match := _EXPERT.fullmatch(name))}
        if found != set(range(len(found))):
            raise self.top.fail(f"holds {len(found)} experts, but not those numbered from 0")
        return len(found)


@dataclass(frozen=True, slots=True)
class Grid:
    """All ranks of a checkpoint, complete."""

    folder: str
    arguments: Arguments
    tensor_size: int
    stages: int
    expert_size: int
    ranks: dict[tuple[int, int, int], Rank]
    """By (stage, expert rank, tensor rank)."""
    dropped: tuple[str, ...]
    """What the model files hold beside tensors."""

    @property
    def first(self) -> Rank:
        """The first rank of all."""
        return self.ranks[0, 0, 0]


def read_ranks(files: Files, folder: str) -> Grid:
    """Load what every rank saved; raises `CorruptCheckpoint` when a rank is missing or the ranks do not fit."""
    places: dict[tuple[int, ...], str] = {}
    for name in files.names():
        below, slash, base = name.removeprefix(folder).rpartition("/")
        match = _RANK.fullmatch(below)
        if name.startswith(folder) and slash and base == MODEL_FILE and match:
            numbers = tuple(int(number) for number in match.groups() if number is not None)
            if numbers in places:
                raise CheckpointError(f"{files.label(name)} and {files.label(places[numbers])} are of the same rank")
            places[numbers] = name
    tops = {numbers: Node(load_archive(files, name), files.label(name)) for numbers, name in sorted(places.items())}
    first = next(iter(tops.values()))
    arguments = arguments_of(first)
    sizes = _sizes(arguments, list(places))
    dropped: dict[str, None] = {}
    ranks = {}
    for numbers, top in tops.items():
        stage, expert = _place(numbers, sizes, top)
        below = places[numbers].removesuffix(MODEL_FILE)
        rank = Rank(numbers[0], stage, expert, places[numbers], below, top)
        for chunk in _models(top, arguments.virtual_stages):
            rank.add(dict(_flat(chunk, dropped)))
        ranks[stage, expert, rank.tensor] = rank
    _complete(files, folder, sizes, ranks)
    for rank in ranks.values():
        _same(first, rank.top, arguments)
    _require_all_layers(arguments, [ranks[stage, 0, 0] for stage in range(sizes[1])])
    return Grid(folder, arguments, *sizes, ranks, tuple(dropped))


def arguments_of(top: Node) -> Arguments:
    """The arguments among what a file holds."""
    args = top.find("args")
    if args is not None and not isinstance(args.value, Record):
        raise args.fail("is not the namespace of arguments")
    return Arguments(None if args is None else args.value, top.label)


def _sizes(arguments: Arguments, places: list[tuple[int, ...]]) -> tuple[int, int, int]:
    """Tensor-, pipeline- and expert-parallel size, from the arguments or else from the folders' names."""
    if arguments.record is None:
        if any(len(numbers) > 2 for numbers in places):
            raise CheckpointError(f"{arguments.label} has no args, which say how ranks are numbered: save them, too")
        return 1 + max(one[0] for one in places), 1 + max((one[1] for one in places if len(one) > 1), default=0), 1
    tensor = arguments.count("tensor_model_parallel_size") or 1
    expert_tensor = arguments.count("expert_tensor_parallel_size")
    expert = arguments.count("expert_model_parallel_size") or 1
    if expert_tensor not in (None, tensor) and arguments.get("num_experts") is not None:
        raise CheckpointError(
            f"{arguments.label} has experts with tensor-parallel size {expert_tensor} beside {tensor} elsewhere, which "
            "is not read: save it in Megatron-LM's torch_dist format"
        )
    return tensor, arguments.count("pipeline_model_parallel_size") or 1, expert


def _place(numbers: tuple[int, ...], sizes: tuple[int, int, int], top: Node) -> tuple[int, int]:
    """Stage and expert rank of a folder's numbers."""
    _, stages, experts = sizes
    if len(numbers) != 1 + (stages > 1) + (experts > 1):
        raise top.fail(f"is in a folder that does not fit {stages} pipeline stages and {experts} expert ranks")
    return (numbers[1] if stages > 1 else 0), (numbers[-1] if experts > 1 else 0)


def _complete(files: Files, folder: str, sizes: tuple[int, int, int], ranks: dict[tuple[int, int, int], Rank]) -> None:
    tensor, stages, experts = sizes
    if tensor * stages * experts > 1 << 20:
        raise CheckpointError(f"{files.location} says that it has {tensor * stages * experts} ranks, which no job has")
    for stage in range(stages):
        for expert in range(experts):
            for index in range(tensor):
                if (stage, expert, index) not in ranks:
                    raise CheckpointError(
                        f"{files.location}/{folder} has no file of tensor rank {index}, stage {stage}, expert rank "
                        f"{expert}: restore it or another checkpoint"
                    )
    if len(ranks) != tensor * stages * experts:
        raise CheckpointError(
            f"{files.location}/{folder} has {len(ranks)} ranks instead of {tensor * stages * experts}: move the others "
            "away"
        )


def _same(first: Node, top: Node, arguments: Arguments) -> None:
    """Files of one save agree about the iteration and the arguments that shape it."""
    mine, theirs = top.find("iteration"), first.find("iteration")
    if (None if mine is None else mine.value) != (None if theirs is None else theirs.value):
        raise top.fail("is of another iteration than the first rank's file")
    other = arguments_of(top)
    for key in _SHAPING:
        mine_is, theirs_is = other.get(key), arguments.get(key)
        if type(mine_is) is not type(theirs_is) or mine_is != theirs_is:
            raise top.fail(f"has another {key} than the first rank's file")


def _require_all_layers(arguments: Arguments, stages: list[Rank]) -> None:
    total, held = arguments.count("num_layers"), sum(sum(rank.layers) for rank in stages)
    if total is not None and held and held != total:
        raise stages[0].top.fail(f"and the files of the other stages hold {held} layers of {total}")


def _models(top: Node, virtual_stages: int) -> list[Node]:
    if virtual_stages == 1:
        return [top.at("model")]
    return [top.at(f"model{chunk}") for chunk in range(virtual_stages)]


def _flat(node: Node, dropped: dict[str, None], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors of nested mappings with their keys joined; what else there is goes to `dropped`."""
    if depth > _MAX_DEPTH:
        raise node.fail("is nested deeper than any model")
    for key, member in node.named():
        name = prefix + key
        if key == "_extra_state" or key.endswith("._extra_state"):
            dropped["_extra_state"] = None
        elif isinstance(member.value, StoredTensor):
            yield name, member.value
        elif isinstance(member.value, dict):
            yield from _flat(member, dropped, name + ".", depth + 1)
        elif member.value is not None:
            dropped[name] = None
