"""DeepSpeed ZeRO 3: every parameter is cut over the ranks; each flattens its parts into one vector per sub-group.

Rank r of W has the elements `r * P .. (r + 1) * P` of a flattened parameter, P = ceil(numel / W); what goes beyond its
end is padding that nobody ever set, and is never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.deepspeed_flat import (
    FlatGroup,
    Held,
    Parameter,
    Pieces,
    Shape,
    Slice,
    add_states,
    add_values,
    step_of,
)
from orchestrator.checkpoint.formats.pickled_values import Node
from orchestrator.checkpoint.layout import ITEM_BYTES, Box, Chunk, flat_boxes

FP32 = "fp32_flat_groups"
OPTIMIZER = "optimizer_state_dict"


def read_subgroups(
    files: Files, shapes: Sequence[dict[str, Shape]], ranks: Sequence[Node], notes: list[str]
) -> dict[str, Parameter]:
    """The optimizer's parameters from the `optimizer_state_dict` of every data-parallel rank, in order.

    `shapes` are the sub-groups of `param_shapes`. Raises `CorruptCheckpoint`.
    """
    parameters: dict[str, Parameter] = {}
    for rank in ranks:
        _require_ranks(rank, len(ranks))
        if len(rank.at(FP32).items()) != len(shapes):
            raise rank.at(FP32).fail(
                f"has {len(rank.at(FP32).items())} sub-groups where param_shapes has {len(shapes)}: they are of "
                "different checkpoints, or lie in files of their own (offloaded), which are not read"
            )
    for index, group_shapes in enumerate(shapes):
        for name, shape in group_shapes.items():
            if name in parameters:
                raise ranks[0].fail("belongs to two sub-groups", name)
            parameters[name] = Parameter(shape)
        pieces = Pieces(files, layout(group_shapes, len(ranks)), parameters)
        add_values(pieces, [rank.at(FP32).at(index) for rank in ranks])
        add_states(pieces, [rank.at(OPTIMIZER).at("state").find(index) for rank in ranks], notes)
        _add_group_step(pieces, ranks[0], index)
    return parameters


def layout(shapes: dict[str, Shape], world: int) -> FlatGroup:
    """Where the sub-group's parameters lie in the vectors of the ranks."""
    slices: dict[str, list[Slice]] = {}
    offset = 0
    for name, shape in shapes.items():
        count = prod(shape)
        part = -(-count // world)
        slices[name] = [
            Slice(rank, offset, rank * part, min(part, count - rank * part))
            for rank in range(world)
            if rank * part < count
        ]
        offset += part
    return FlatGroup(shapes, slices, (offset,) * world, (offset,) * world)


def frozen_tensor(files: Files, name: str, shape: Shape, fragments: Sequence[Node]) -> Held:
    """A parameter that is not trained, from every rank's `frozen_param_fragments` (or from one with all of it)."""
    first = fragments[0].tensor(name)
    if first.shape == shape and (len(shape) != 1 or len(fragments) == 1):
        chunk = Chunk(Box.whole(shape), first.file, first.begin, strides=first.strides)
        return Held(first.dtype, shape, (chunk,) if first.elements else ())
    count = prod(shape)
    part = -(-count // len(fragments))
    chunks: list[Chunk] = []
    for rank, node in enumerate(fragments):
        stored = node.tensor(name)
        if stored.shape != (part,) or stored.strides is not None or stored.dtype != first.dtype:
            raise node.fail(
                f"is {stored.dtype} {list(stored.shape)} where {first.dtype} [{part}] is expected for {list(shape)}",
                name,
            )
        held = max(0, min(part, count - rank * part))
        chunks += [
            Chunk(box, stored.file, stored.begin + at * ITEM_BYTES[stored.dtype])
            for at, box in flat_boxes(shape, rank * part, held)
        ]
    return Held(first.dtype, shape, tuple(chunks))


def subgroups_of(rank: Node, count: int) -> list[list[int]]:
    """The sub-groups that make up each parameter group."""
    groups = [[one.count() for one in group.at("params").items()] for group in rank.at("param_groups").items()]
    if sorted(one for group in groups for one in group) != list(range(count)):
        raise rank.fail(f"has parameter groups of other sub-groups than the {count} of param_shapes")
    return groups


def _require_ranks(rank: Node, world: int) -> None:
    count = rank.find("partition_count")
    if count is not None and count.count() != world:
        raise count.fail(f"is {count.count()} where the files of {world} ranks are read: it was saved by other ranks")
    for group in [] if (found := rank.find("ds_zero_partition_groups")) is None else found.items():
        said = group.find("partition_count")
        if said is not None and said.count() != world:
            raise corrupt(
                rank.label, f"{group.path} is cut over {said.count()} of {world} ranks: it holds experts, not read"
            )


def _add_group_step(pieces: Pieces, rank: Node, index: int) -> None:
    """Fused optimizers keep the step with the group's hyper-parameters."""
    if any("step" in pieces.parameters[name].tensors for name in pieces.group.shapes):
        return
    for group in rank.at(OPTIMIZER).at("param_groups").items():
        step = group.find("step")
        if step is not None and index in [one.count() for one in group.at("params").items()]:
            pieces.add_scalar("step", step_of(pieces.files, step))
