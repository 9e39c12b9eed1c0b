"""The optimizer of one Megatron-LM rank: which state belongs to which parameter.

The file numbers parameters and does not name them. The numbers run through the optimizer's groups; a group holds the
parameters of its kind in the model's order (`megatron/core/optimizer/__init__.py`): without weight decay are biases and
vectors, and experts have groups of their own where they are divided over ranks. Counts and shapes are checked.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.checkpoint.archive import StoredTensor, load_archive
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.megatron_ranks import OPTIMIZER_FILE, Rank
from orchestrator.checkpoint.formats.pickled_values import Node, read_scalar, short
from orchestrator.checkpoint.language import Shard
from orchestrator.checkpoint.layout import ITEM_BYTES, Box, Chunk

HALVES = ("F16", "BF16")
_EXPERT = re.compile(r"\.(local_)?experts\.")
_ALIGNMENT = 64
"""Elements at whose multiples parameters begin in the distributed optimizer's buffers."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of a rank."""

    dtype: str
    shard: Shard


@dataclass(slots=True)
class States:
    """What the optimizers of a rank hold, by the parameters' names."""

    masters: dict[str, Held] = field(default_factory=dict)
    states: dict[str, dict[str, Held]] = field(default_factory=dict)
    groups: list[tuple[Node, list[str]]] = field(default_factory=list)
    """Each parameter group with its parameters."""

    def add(self, parameter: str, state: str, held: Held) -> None:
        """Note one state of a parameter."""
        self.states.setdefault(parameter, {})[state] = held


def held(stored: StoredTensor) -> Held:
    """A tensor as it is stored."""
    chunk = Chunk(Box.whole(stored.shape), stored.file, stored.begin, strides=stored.strides)
    return Held(stored.dtype, Shard(stored.shape, (chunk,) if stored.elements else ()))


def scalar(number: float) -> Held:
    """A number as a tensor."""
    return Held("F32", Shard((), (Chunk(Box((), ()), "", 0, data=struct.pack("<f", number)),)))


def read_states(files: Files, rank: Rank, chunks: Sequence[Mapping[str, StoredTensor]]) -> States:
    """The states of the rank's trained parameters, given for each model chunk in the model's order.

    Raises `CorruptCheckpoint` where they do not fit.
    """
    found = States()
    parameters = {name: tensor for chunk in chunks for name, tensor in chunk.items()}
    node = rank.top.find("optimizer")
    if node is None:
        return found
    optimizers = chained(node)
    inner = [optimizer.find("optimizer") or optimizer for optimizer in optimizers]
    shapes = {name: tensor.shape for name, tensor in parameters.items()}
    kinds = Kinds([group for one in inner for group in one.at("param_groups").items()], shapes)
    sharded = rank.folder + OPTIMIZER_FILE
    for optimizer, torch_optimizer in zip(optimizers, inner, strict=True):
        members = []
        for group in torch_optimizer.at("param_groups").items():
            members.append(kinds.take(group))
            found.groups.append((group, members[-1]))
        if torch_optimizer.find("state") is not None:
            _add_states(files, found, torch_optimizer, members, parameters)
        if optimizer.find("fp32_from_fp16_params") is not None:
            _add_masters(found, optimizer.at("fp32_from_fp16_params"), members, parameters)
    kinds.require_all_taken(node)
    if sharded in files.names():
        if len(optimizers) != 1:
            raise node.fail(f"has {len(optimizers)} optimizers whose states {OPTIMIZER_FILE} does not tell apart")
        top = Node(load_archive(files, sharded), files.label(sharded))
        _add_sharded(found, top, chunks)
        _add_group_steps(files, found)
    return found


def chained(node: Node) -> list[Node]:
    """The optimizers of a rank: one, or several in a list or under their numbers."""
    if isinstance(node.value, dict) and node.value and all(type(key) is int for key in node.value):
        found = [node.at(key) for key in sorted(node.value)]
    else:
        found = node.items() if isinstance(node.value, list | tuple) else [node]
    return [optimizer for optimizer in found if optimizer.value is not None]


class Kinds:
    """Which parameters (names and shapes, in the model's order) each group takes."""

    def __init__(self, groups: Sequence[Node], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.left = dict(shapes)
        self.alone = len(groups) == 1
        self.experts = any(_flag(group, "is_expert_parallel") for group in groups)
        self.decoupled = any(_flag(group, "is_decoupled_lr") for group in groups)

    def take(self, group: Node, *, counted: bool = True) -> list[str]:
        """The parameters of the next group; `counted` where it lists as many numbers as it has parameters."""
        group.mapping()
        taken = [name for name, shape in self.left.items() if self.alone or self._fits(group, name, shape)]
        params = group.find("params") if counted else None
        if params is not None and len(params.items()) != len(taken):
            raise group.fail(
                f"has {len(params.items())} parameters but {len(taken)} of the model are of its kind, so that they "
                "cannot be named"
            )
        for name in taken:
            del self.left[name]
        return taken

    def _fits(self, group: Node, name: str, shape: tuple[int, ...]) -> bool:
        if self.experts and _flag(group, "is_expert_parallel") != (_EXPERT.search(name) is not None):
            return False
        edge = "word_embeddings" in name or "output_layer" in name
        if self.decoupled and _flag(group, "is_decoupled_lr") != edge:
            return False
        decay = group.at("wd_mult").value
        plain = name.endswith(".bias") or len(shape) == 1
        return not isinstance(decay, int | float) or (decay == 0) == plain

    def require_all_taken(self, node: Node) -> None:
        """Raise unless every parameter has a group."""
        if self.left:
            raise node.fail("has no group for it", next(iter(self.left)))


def _flag(group: Node, key: str) -> bool:
    return isinstance(group.value, dict) and group.value.get(key) is True


# ---------------------------------------------------------------- states by number


def _add_states(
    files: Files, found: States, optimizer: Node, members: list[list[str]], parameters: Mapping[str, StoredTensor]
) -> None:
    state = optimizer.at("state")
    state.mapping()
    for group, names in zip(optimizer.at("param_groups").items(), members, strict=True):
        params = group.find("params")
        numbers = [] if params is None else params.items()
        shared = group.find("step")
        for name, number in zip(names, numbers, strict=False):
            one = state.find(number.value) if isinstance(number.value, int) else None
            if one is None:
                continue
            for key, value in one.named():
                _add_state(files, found, name, key, value, parameters[name].shape)
            if shared is not None and "step" not in found.states.get(name, {}):
                found.add(name, "step", scalar(number_of_steps(files, shared)))


def _add_state(files: Files, found: States, name: str, key: str, value: Node, shape: tuple[int, ...]) -> None:
    if key == "step":
        found.add(name, key, scalar(number_of_steps(files, value)))
    elif value.value is not None:
        stored = value.tensor(name)
        if stored.shape not in (shape, ()):
            raise value.fail(f"has the shape {list(stored.shape)} but the parameter {list(shape)}", name)
        found.add(name, key, held(stored))


def _add_masters(found: States, node: Node, members: list[list[str]], parameters: Mapping[str, StoredTensor]) -> None:
    groups = node.items()
    if len(groups) != len(members):
        raise node.fail(f"has {len(groups)} groups but the optimizer {len(members)}")
    for group, names in zip(groups, members, strict=True):
        halves = [name for name in names if parameters[name].dtype in HALVES]
        masters = group.items()
        if len(masters) != len(halves):
            raise group.fail(f"has {len(masters)} tensors but the group {len(halves)} parameters in half precision")
        for name, master in zip(halves, masters, strict=True):
            stored = master.tensor(name)
            if stored.shape != parameters[name].shape:
                raise master.fail(
                    f"has the shape {list(stored.shape)} but the parameter {list(parameters[name].shape)}", name
                )
            found.masters[name] = held(stored)


def number_of_steps(files: Files, node: Node) -> float:
    """The optimizer's count of steps, a number or a tensor of one."""
    value = node.value
    if isinstance(value, StoredTensor) and value.elements == 1:
        value = read_scalar(files, value)
    if not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 2**53:
        raise node.fail(f"is {short(node.value)} where a number of steps is expected")
    return float(value)


# ---------------------------------------------------------------- the distributed optimizer


def _add_sharded(found: States, top: Node, chunks: Sequence[Mapping[str, StoredTensor]]) -> None:
    """States that data-parallel ranks had divided, gathered into one vector per buffer (`distrib_optim.pt`).

    A buffer holds the parameters of a model chunk from the last to the first, each from a multiple of 64 elements on;
    the padding at the end of each bucket is left out, so that where buckets end matters only if that is not a multiple.
    """
    if top.find("buckets_coalesced") is None:
        raise top.fail("is of a version that keeps every bucket on its own, which is not read: load and save it again")
    buffers = [key for key in top.mapping() if type(key) is int]
    if sorted(buffers) != list(range(len(chunks))):
        raise top.fail(f"has {len(buffers)} buffers but the rank {len(chunks)} model chunks, which is not read")
    for index, chunk in enumerate(chunks):
        dtypes = top.at(index)
        if len(dtypes.mapping()) != 1:
            raise dtypes.fail("has buffers of several dtypes, which is not read")
        buffer = dtypes.at(next(iter(dtypes.value)))
        places, total = _offsets(buffer, chunk)
        for key, node in buffer.named():
            if isinstance(node.value, StoredTensor):
                _add_vector(found, key, node, places, total, chunk)


def _offsets(buffer: Node, chunk: Mapping[str, StoredTensor]) -> tuple[dict[str, int], int]:
    """Where each parameter begins if all are in one bucket, and the end.

    Several buckets, whose ends leave padding out, have fewer elements unless they lay parameters out just so: the
    number of elements tells.
    """
    places: dict[str, int] = {}
    end = 0
    for name in reversed(list(chunk)):
        places[name] = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = places[name] + chunk[name].elements
    said = buffer.at("numel_unpadded").count()
    if said != end:
        raise buffer.fail(
            f"has {said} elements where {end} are expected: parameters that do not end at multiples of {_ALIGNMENT} "
            "elements are in several buckets, which is not read"
        )
    return places, end


def _add_vector(
    found: States,
    key: str,
    node: Node,
    places: Mapping[str, int],
    total: int,
    parameters: Mapping[str, StoredTensor],
) -> None:
    vector = node.tensor()
    if vector.strides is not None or len(vector.shape) != 1 or vector.elements < total:
        raise node.fail(f"is {short(vector)} where a vector of {total} elements is expected")
    for name, start in places.items():
        shape = parameters[name].shape
        chunk = Chunk(Box.whole(shape), vector.file, vector.begin + start * ITEM_BYTES[vector.dtype])
        one = Held(vector.dtype, Shard(shape, (chunk,) if parameters[name].elements else ()))
        if key == "param":
            found.masters[name] = one
        else:
            found.add(name, key, one)


def _add_group_steps(files: Files, found: States) -> None:
    for group, names in found.groups:
        step = group.find("step")
        for name in names if step is not None else ():
            assert step is not None
            found.add(name, "step", scalar(number_of_steps(files, step)))


def hyper_parameters(group: Node) -> dict[Any, Any]:
    """A group without its parameters and the step, which is a state of theirs."""
    return {key: value for key, value in group.mapping().items() if key not in ("params", "step")}
