"""DeepSpeed ZeRO 1 and 2 (and its BF16 optimizer): each parameter group is one vector, cut evenly over the ranks.

The vector is the group's parameters in the order of `param_shapes`, flattened, each followed by its alignment padding;
the end is padded to a multiple of what the ranks can share. Which rank's file holds which elements of a parameter
follows from that, and is compared with what the files say themselves (`param_slice_mappings`, `group_paddings`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.deepspeed_experts import Experts
from orchestrator.checkpoint.formats.deepspeed_flat import (
    FlatGroup,
    Parameter,
    Pieces,
    Shape,
    Slice,
    add_states,
    add_values,
    step_of,
)
from orchestrator.checkpoint.formats.pickled_values import Node, short
from orchestrator.checkpoint.unpickle import Record

FP32 = "single_partition_of_fp32_groups"
STATES = "base_optimizer_state"
MAPPINGS = "param_slice_mappings"


def read_groups(
    files: Files,
    shapes: Sequence[dict[str, Shape]],
    ranks: Sequence[Node],
    notes: list[str],
    experts: Experts | None = None,
) -> dict[str, Parameter]:
    """The optimizer's parameters from the `optimizer_state_dict` of every data-parallel rank, in order.

    `shapes` are the groups of `param_shapes`. Raises `CorruptCheckpoint`.
    """
    parameters: dict[str, Parameter] = {}
    for index, group_shapes in enumerate(shapes):
        for team in (experts or Experts()).teams(ranks, index, group_shapes):
            names = [team.name(name) for name in group_shapes]
            for name in names:
                if name in parameters:
                    raise ranks[0].fail("belongs to two parameter groups", name)
            group = _read_group(files, group_shapes, team.ranks, (index, len(shapes)), notes)
            parameters |= zip(names, group.values(), strict=True)
    return parameters


def _read_group(
    files: Files, shapes: dict[str, Shape], ranks: Sequence[Node], place: tuple[int, int], notes: list[str]
) -> dict[str, Parameter]:
    """The parameters of the group at `place` (its position and the number of groups), which is cut over `ranks`."""
    index, count = place
    parameters = {name: Parameter(shape) for name, shape in shapes.items()}
    values = [_group(rank.at(FP32), index, count) for rank in ranks]
    for rank in ranks:
        _require_ranks(rank, index, len(ranks))
    alignment = _alignment(ranks[0], index, shapes)
    group = layout(shapes, alignment, len(ranks), _length(values[0]), _padding(ranks[0], index))
    _check_lengths(ranks, index, group, values)
    _check_mappings(ranks, index, group)
    pieces = Pieces(files, group, parameters)
    add_values(pieces, values)
    states = [_states(rank, index) for rank in ranks]
    add_states(pieces, states, notes)
    _add_group_step(pieces, ranks[0], index)
    return parameters


def group_names(shapes: Sequence[dict[str, Shape]], ranks: Sequence[Node], experts: Experts) -> list[list[str]]:
    """What the parameters of each group are called in the whole model."""
    return [
        [team.name(name) for team in experts.teams(ranks, index, group) for name in group]
        for index, group in enumerate(shapes)
    ]


def shapes_of_mappings(ranks: Sequence[Node], known: Mapping[str, Shape]) -> list[dict[str, Shape]]:
    """The groups in the order of their slices, for checkpoints without `param_shapes`; `known` has the shapes."""
    groups: list[dict[str, Shape]] = []
    for rank in ranks:
        for index, mapping in enumerate(rank.at(MAPPINGS).items()):
            if index == len(groups):
                groups.append({})
            starts = [(_address(node)[0], name) for name, node in mapping.named()]
            for _, name in sorted(starts):
                if name not in known:
                    raise mapping.fail("is of a parameter whose shape no model file says", name)
                groups[index].setdefault(name, known[name])
    return groups


def layout(
    shapes: dict[str, Shape], alignment: Sequence[int], world: int, first: int, padding: int | None
) -> FlatGroup:
    """Where the group's parameters lie in the vectors of the ranks, of which the first has so many elements.

    That one is full, or holds the whole group: then it may lack its padding, of which `padding` elements are known.
    """
    starts, position = {}, 0
    for (name, shape), gap in zip(shapes.items(), alignment, strict=True):
        starts[name] = position
        position += prod(shape) + gap
    share = first
    if first == position:
        share += -(-position // (2 * world)) * 2 - position if padding is None else padding
    share = max(share, first)
    slices = {name: _slices(starts[name], prod(shape), share, world) for name, shape in shapes.items()}
    used = tuple(max(0, min(share, position - rank * share)) for rank in range(world))
    return FlatGroup(shapes, slices, used, (share,) * world)


def _slices(start: int, count: int, share: int, world: int) -> list[Slice]:
    found: list[Slice] = []
    done = 0
    while done < count and share:
        rank, offset = divmod(start + done, share)
        if rank >= world:
            break  # the vectors are too short, which their lengths tell
        piece = min(count - done, share - offset)
        found.append(Slice(rank, offset, done, piece))
        done += piece
    return found


def _group(groups: Node, index: int, count: int) -> Node:
    if len(groups.items()) != count:
        raise groups.fail(f"has {len(groups.items())} parameter groups where param_shapes has {count}")
    return groups.at(index)


def _length(node: Node) -> int:
    return node.tensor().elements


def _require_ranks(rank: Node, index: int, world: int) -> None:
    """The group must be cut over these ranks."""
    counts = rank.find("partition_count")
    if counts is None:
        return
    count = (counts.at(index) if isinstance(counts.value, list | tuple) else counts).count()
    if count != world:
        raise counts.fail(
            f"says that parameter group {index} is cut over {count} ranks where {world} are expected: it was saved by "
            "another number of ranks, or holds experts that are not DeepSpeed's own"
        )


def _alignment(rank: Node, index: int, shapes: dict[str, Shape]) -> list[int]:
    """Padding after each parameter."""
    paddings = rank.find("param_alignment_paddings")
    if paddings is None:
        return [0] * len(shapes)
    found = [one.count() for one in paddings.at(index).items()]
    if len(found) != len(shapes):
        raise paddings.fail(f"has {len(found)} paddings for the {len(shapes)} parameters of group {index}")
    return found


def _padding(rank: Node, index: int) -> int | None:
    paddings = rank.find("group_paddings")
    return None if paddings is None else paddings.at(index).count()


def _check_lengths(ranks: Sequence[Node], index: int, group: FlatGroup, values: Sequence[Node]) -> None:
    total = sum(group.used)
    expected = sum(prod(shape) for shape in group.shapes.values())
    held = sum(one.count for slices in group.slices.values() for one in slices)
    if held != expected:
        raise values[-1].fail(
            f"and its likes hold {sum(map(_length, values))} elements of {total} where parameter group {index} has "
            f"{expected}: a rank's file is of another checkpoint, or cut off"
        )
    for rank, node in enumerate(values):
        length, used, room = _length(node), group.used[rank], group.room[rank]
        if length not in (used, room):
            raise node.fail(f"has {length} elements where {used} are expected, or {room} with padding")
        padding = _padding(ranks[rank], index)
        # The BF16 optimizer counts all padding at the last rank, the others each its own.
        if padding not in (None, room - used, 0, room * len(ranks) - total):
            raise ranks[rank].fail(f"says {padding} in group_paddings[{index}] where {room - used} is expected")


def _check_mappings(ranks: Sequence[Node], index: int, group: FlatGroup) -> None:
    """What each rank says about its slices must be what follows from the shapes.

    With `round_robin_gradients` DeepSpeed (0.19.8, for one) writes the slices of a group that was never reordered.
    """
    for rank, node in enumerate(ranks):
        mappings = node.find(MAPPINGS)
        if mappings is None:
            continue
        mapping = mappings.at(index)
        said = {name: _address(address) for name, address in mapping.named()}
        due = _addresses(group.slices, rank)
        if said == due or said == _addresses(_before_round_robin(group, len(ranks)), rank):
            continue
        name = min(name for name in said.keys() | due.keys() if said.get(name) != due.get(name))
        raise mapping.fail(
            f"says {_place(said.get(name))} where {_place(due.get(name))} follows from param_shapes: the file is of "
            "another rank or another checkpoint",
            name,
        )


def _addresses(slices: dict[str, list[Slice]], rank: int) -> dict[str, tuple[int, int]]:
    return {name: (one.offset, one.count) for name, pieces in slices.items() for one in pieces if one.rank == rank}


def _before_round_robin(group: FlatGroup, world: int) -> dict[str, list[Slice]]:
    """The slices if the parameters lay in the order that they had before they were dealt out to the ranks in turn."""
    names = list(group.shapes)
    dealt = iter(names)
    order = dict(sorted((index, next(dealt)) for first in range(world) for index in range(first, len(names), world)))
    slices, position = {}, 0
    for name in order.values():
        count = prod(group.shapes[name])
        slices[name] = _slices(position, count, group.room[0], world)
        position += count
    return slices


def _address(node: Node) -> tuple[int, int]:
    """Start and length that a `fragment_address` says."""
    record = node.value
    if not isinstance(record, Record):
        raise node.fail(f"is {short(record)} where a fragment address is expected")
    start, count = (Node(record.get(key), node.label, f"{node.path}.{key}").count() for key in ("start", "numel"))
    return start, count


def _place(address: tuple[int, int] | None) -> str:
    return "no elements" if address is None else f"{address[1]} elements at {address[0]}"


def _states(rank: Node, index: int) -> Node | None:
    """The states of the group's vector: by the id of its one parameter, or (elastic) by the group's position."""
    states = rank.find(STATES)
    if states is None:
        return None
    if isinstance(states.value, list | tuple):
        return states.at(index)
    groups = states.find("param_groups")
    key = index
    if groups is not None:
        ids = groups.at(index).at("params").items()
        if len(ids) != 1:
            raise groups.fail(f"has {len(ids)} flat parameters in group {index} where one is expected")
        key = ids[0].count()
    return states.at("state").find(key)


def _add_group_step(pieces: Pieces, rank: Node, index: int) -> None:
    """Fused optimizers keep the step with the group's hyper-parameters."""
    states = rank.find(STATES)
    groups = None if states is None else states.find("param_groups")
    step = rank.find("base_optimizer_state_step") if groups is None else groups.at(index).find("step")
    if step is None:
        return
    if any("step" in pieces.parameters[name].tensors for name in pieces.group.shapes):
        return
    pieces.add_scalar("step", step_of(pieces.files, step))
