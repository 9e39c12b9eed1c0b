"""From what the model-parallel ranks hold to whole tensors: pipeline copies, and tensor-parallel shards by rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.formats.deepspeed_affine import AffineMap
from orchestrator.checkpoint.formats.deepspeed_flat import STEP, Held, Parameter
from orchestrator.checkpoint.formats.deepspeed_rules import Chooser
from orchestrator.checkpoint.language import Rule, Shard, merge
from orchestrator.checkpoint.layout import Chunk, LogicalTensor, tensor_name

Copies = dict[str, list[Parameter]]
"""Of one tensor-parallel rank: the copies of each parameter, one from each pipeline stage that has it."""


@dataclass(slots=True)
class Whole:
    """The tensors of the whole model."""

    tensors: dict[str, LogicalTensor] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    training_dtypes: dict[str, str] = field(default_factory=dict)


def merge_ranks(place: str, ranks: Sequence[Copies], chooser: Chooser, notes: list[str]) -> Whole:
    """Whole tensors from every tensor-parallel rank's; raises `CorruptCheckpoint` or `CheckpointError`."""
    whole = Whole()
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        stages = max(len(rank.get(name, ())) for rank in ranks)
        first: list[LogicalTensor] = []
        for stage in range(stages):
            shards = [_copy(place, name, rank, stage, index) for index, rank in enumerate(ranks)]
            again = _merge_stage(place, name, shards, chooser, notes)
            first = [_with_copy(place, tensor, again) for tensor in first] if stage else again
        copies = [rank[name][0] for rank in ranks]
        for tensor in first:
            if tensor.name in whole.tensors:
                raise corrupt(place, "two tensors have this name", tensor.name)
            whole.tensors[tensor.name] = tensor
        if copies[0].kind == "parameter" and all(copy.frozen for copy in copies):
            whole.frozen.add(name)
        trained = next((copy.training_dtype for copy in copies if copy.training_dtype), None)
        if copies[0].kind == "parameter" and trained not in (None, first[0].dtype):
            whole.training_dtypes[name] = str(trained)
    return whole


def _copy(place: str, name: str, rank: Copies, stage: int, index: int) -> Parameter:
    copies = rank.get(name, [])
    if stage >= len(copies):
        raise corrupt(place, f"tensor-parallel rank {index} does not have it, while others have", name)
    return copies[stage]


def _merge_stage(
    place: str, name: str, shards: Sequence[Parameter], chooser: Chooser, notes: list[str]
) -> list[LogicalTensor]:
    """The value and the states of one parameter, from its shard on every tensor-parallel rank."""
    kind = shards[0].kind
    if any(shard.kind != kind for shard in shards):
        raise corrupt(place, "it is a buffer on some ranks and a parameter on others", name)
    rule = chooser.rule(name, kind, [shard.shape for shard in shards])
    found = []
    for state in dict.fromkeys(state for shard in shards for state in shard.tensors):
        pieces = _pieces(place, name, state, shards)
        if pieces is None:
            notes.append(
                f"The state {state} of {name} is not the same number on all tensor-parallel ranks: it is left out."
            )
            continue
        found.append(_merge_one(name, state, kind, rule, pieces))
    return found


def _pieces(place: str, name: str, state: str | None, shards: Sequence[Parameter]) -> list[Held] | None:
    """One tensor on every rank; a rank without elements of the parameter has an empty one. None for unequal numbers."""
    full = tensor_name(name, state)
    solid = [shard for shard in shards if 0 not in shard.shape] or list(shards)
    present = [shard.tensors[state] for shard in solid if state in shard.tensors]
    if len(present) != len(solid):
        raise corrupt(place, "some tensor-parallel ranks lack it, while others have it", full)
    first = present[0]
    for piece in present:
        if piece.dtype != first.dtype:
            raise corrupt(place, f"it is {piece.dtype} and {first.dtype} on different tensor-parallel ranks", full)
    if not is_number(first):
        nothing = {id(shard): Held(first.dtype, shard.shape, ()) for shard in shards if 0 in shard.shape}
        return [nothing.get(id(shard)) or shard.tensors[state] for shard in shards]
    if all(piece.chunks[0].data == first.chunks[0].data for piece in present if is_number(piece)):
        return [first for _ in shards]
    if state == STEP:
        raise corrupt(place, "tensor-parallel ranks have taken different steps", full)
    return None


def is_number(held: Held) -> bool:
    """Whether the tensor is one number for the whole parameter."""
    return len(held.chunks) == 1 and held.chunks[0].data is not None


def _merge_one(
    name: str, state: str | None, kind: str, rule: Rule | AffineMap | None, pieces: Sequence[Held]
) -> LogicalTensor:
    full, first = tensor_name(name, state), pieces[0]
    kind = kind if state is None else "state"
    if rule is None or is_number(first):
        return LogicalTensor(full, name, state, kind, first.dtype, first.shape, first.chunks)
    if isinstance(rule, AffineMap):
        return rule.merge(name, state, kind, pieces)
    return merge(full, name, state, kind, first.dtype, rule, [Shard(piece.shape, piece.chunks) for piece in pieces])


def _with_copy(place: str, tensor: LogicalTensor, again: Sequence[LogicalTensor]) -> LogicalTensor:
    """The tensor with a further pipeline stage's copy of it."""
    same = [one for one in again if one.name == tensor.name]
    if len(same) != 1 or (same[0].shape, same[0].dtype) != (tensor.shape, tensor.dtype):
        raise corrupt(place, "pipeline stages that share it hold different shapes, dtypes or states of it", tensor.name)
    if tensor.average or is_inline(tensor.chunks):
        return tensor
    return replace(tensor, others=(*tensor.others, same[0].chunks))


def is_inline(chunks: Sequence[Chunk]) -> bool:
    """Whether the elements are kept with the metadata."""
    return any(chunk.data is not None for chunk in chunks)


def layer_names(layer: int, local: set[str], known: set[str]) -> tuple[str, bool]:
    """The prefix of the whole model's names for a pipeline layer's file, and whether it could be another as well.

    `known` are the names that the model files mention. A layer's own are `<layer>.<name>`; a tied module is stored for
    every layer that it serves, and its names are `tied_modules.<key>.<name>`.
    """
    own = f"{layer}."
    if any(own + name in known for name in local):
        return own, False
    keys: dict[str, set[str]] = {}
    for name in known:
        if name.startswith("tied_modules."):
            key, _, rest = name.removeprefix("tied_modules.").partition(".")
            keys.setdefault(key, set()).add(rest)
    fitting = sorted(key for key, rest in keys.items() if rest <= local)
    if not fitting:
        return own, False
    exact = [key for key in fitting if keys[key] == local]
    chosen = exact[0] if exact else fitting[0]
    return f"tied_modules.{chosen}.", len(fitting) > 1
