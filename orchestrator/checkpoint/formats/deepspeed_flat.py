"""What one model-parallel rank holds of its parameters, pieced together from the flat vectors of its ZeRO ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from orchestrator.checkpoint.archive import StoredTensor
from orchestrator.checkpoint.fields import LARGEST
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.pickled_values import Node, read_scalar, short
from orchestrator.checkpoint.layout import ITEM_BYTES, Box, Chunk, flat_boxes

STEP = "step"
"""Name of the optimizer step among the states; always kept as a scalar of dtype F32."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor as far as this model-parallel rank holds it: chunks that tile a tensor of this shape."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]


@dataclass(slots=True)
class Parameter:
    """A parameter or buffer of one model-parallel rank."""

    shape: Shape
    kind: str = "parameter"
    frozen: bool = False
    training_dtype: str | None = None
    """dtype of the weights in the module; None where it is not known."""
    tensors: dict[str | None, Held] = field(default_factory=dict)
    """The value (None) and the optimizer's states."""


@dataclass(frozen=True, slots=True)
class Slice:
    """`count` elements of a flattened parameter from `start` on, at `offset` of a rank's flat vector."""

    rank: int
    offset: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """Parameters that are flattened into one vector per ZeRO rank."""

    shapes: dict[str, Shape]
    slices: dict[str, list[Slice]]
    used: tuple[int, ...]
    """Per rank, how many elements of its vector hold parameters (with padding among them, without that at its end)."""
    room: tuple[int, ...]
    """Per rank, the length of its vector with all padding."""


class Pieces:
    """The chunks of a group's parameters; boxes are computed once for all states."""

    def __init__(self, files: Files, group: FlatGroup, parameters: dict[str, Parameter]) -> None:
        self.files, self.group, self.parameters = files, group, parameters
        self._boxes = {
            name: [(one, flat_boxes(group.shapes[name], one.start, one.count)) for one in slices]
            for name, slices in group.slices.items()
        }

    def add_flat(self, state: str | None, vectors: Sequence[StoredTensor]) -> None:
        """A state that every rank holds as one vector (of which only those with elements are looked at)."""
        dtypes = {vectors[rank].dtype for rank, used in enumerate(self.group.used) if used}
        dtype = next(iter(dtypes), vectors[0].dtype)
        item = ITEM_BYTES[dtype]
        for name, pieces in self._boxes.items():
            chunks = [
                Chunk(box, vectors[one.rank].file, vectors[one.rank].begin + (one.offset + at) * item)
                for one, boxes in pieces
                for at, box in boxes
            ]
            self.parameters[name].tensors[state] = Held(dtype, self.group.shapes[name], tuple(chunks))

    def whole(self, rank: int) -> int:
        """How many elements the parameters have together of which the rank has a slice."""
        return sum(prod(self.group.shapes[name]) for name, _ in self._overlapping(rank))

    def add_whole(self, state: str, vectors: dict[int, StoredTensor]) -> None:
        """A state that every rank holds of the whole of each parameter of which it has a slice, one after the other.

        The copies of a parameter that is cut are equal: of them the first rank's is taken.
        """
        for rank, held in vectors.items():
            item, position = ITEM_BYTES[held.dtype], held.begin
            for name, slices in self._overlapping(rank):
                shape = self.group.shapes[name]
                if slices[0].rank == rank:
                    chunk = Chunk(Box.whole(shape), held.file, position)
                    self.parameters[name].tensors[state] = Held(held.dtype, shape, (chunk,))
                position += prod(shape) * item

    def _overlapping(self, rank: int) -> list[tuple[str, list[Slice]]]:
        return [item for item in self.group.slices.items() if any(one.rank == rank for one in item[1])]

    def add_scalar(self, state: str, number: float) -> None:
        """A state that is one number for the whole group."""
        held = scalar(state, number)
        for name in self.group.shapes:
            self.parameters[name].tensors[state] = held


def scalar(state: str, number: float) -> Held:
    """A number as a tensor: the step as F32, others in a dtype that holds them exactly."""
    if state == STEP:
        dtype, data = "F32", np.float32(number).tobytes()
    elif isinstance(number, bool):
        dtype, data = "BOOL", bytes([number])
    elif isinstance(number, int) and -(2**63) <= number < 2**63:
        dtype, data = "I64", number.to_bytes(8, "little", signed=True)
    else:
        dtype, data = "F64", np.float64(number).tobytes()
    return Held(dtype, (), (Chunk(flat_boxes((), 0, 1)[0][1], "", 0, data=data),))


def vector(node: Node, lengths: tuple[int, ...]) -> StoredTensor:
    """A flat vector of one of these lengths."""
    stored = node.tensor()
    if len(stored.shape) != 1 or stored.strides is not None or stored.shape[0] not in lengths:
        expected = " or ".join(map(str, sorted(set(lengths))))
        raise node.fail(f"is a tensor of shape {list(stored.shape)} where a vector of {expected} elements is expected")
    return stored


def add_values(pieces: Pieces, nodes: Sequence[Node]) -> None:
    """The fp32 master (or what stands for it) of every rank."""
    group = pieces.group
    vectors = [vector(node, (group.used[rank], group.room[rank])) for rank, node in enumerate(nodes)]
    require_one_dtype(pieces, nodes, vectors)
    pieces.add_flat(None, vectors)


def require_one_dtype(pieces: Pieces, nodes: Sequence[Node], vectors: Sequence[StoredTensor]) -> None:
    """Ranks with elements must agree about the dtype."""
    solid = [rank for rank, used in enumerate(pieces.group.used) if used]
    for rank in solid:
        if vectors[rank].dtype != vectors[solid[0]].dtype:
            raise nodes[rank].fail(f"is {vectors[rank].dtype} where rank {solid[0]} holds {vectors[solid[0]].dtype}")


def add_states(pieces: Pieces, ranks: Sequence[Node | None], notes: list[str]) -> None:
    """The optimizer's states of a group, given each rank's mapping of them (None = it has none)."""
    used = pieces.group.used
    solid = [rank for rank, count in enumerate(used) if count]
    held = [rank for rank in solid if ranks[rank] is not None and ranks[rank].mapping()]  # type: ignore[union-attr]
    if not held:
        return
    if held != solid:
        lacking = next(rank for rank in solid if rank not in held)
        some = ranks[held[0]]
        assert some is not None
        raise some.fail(f"has states, but those of data-parallel rank {lacking} are missing")
    nodes = {rank: node for rank, node in enumerate(ranks) if node is not None}
    states = dict.fromkeys(key for rank in solid for key, _ in nodes[rank].named())
    for state in states:
        _add_state(pieces, state, nodes, solid, notes)


def _add_state(pieces: Pieces, state: str, nodes: dict[int, Node], solid: list[int], notes: list[str]) -> None:
    members = {rank: nodes[rank].find(state) for rank in solid}
    if all(member is None for member in members.values()):
        return  # SGD without momentum has momentum_buffer: None
    for rank, member in members.items():
        if member is None:
            raise nodes[rank].fail(f"lacks {state}, which other data-parallel ranks have")
    known = {rank: member for rank, member in members.items() if member is not None}
    first = known[solid[0]]
    if _is_number(state, first):
        read = step_of if state == STEP else number_of
        numbers = {rank: read(pieces.files, member) for rank, member in known.items()}
        if len(set(numbers.values())) == 1:
            pieces.add_scalar(state, numbers[solid[0]])
        elif state == STEP:
            other = next(rank for rank in solid if numbers[rank] != numbers[solid[0]])
            raise known[other].fail(f"is {numbers[other]}, but rank {solid[0]} has taken {numbers[solid[0]]} steps")
        else:
            notes.append(
                f"The optimizer's state {state} is not the same number on all data-parallel ranks: it is left out."
            )
    elif isinstance(first.value, StoredTensor) and len(first.value.shape) == 1:
        _add_vectors(pieces, state, known, first.value)
    else:
        notes.append(
            f"The optimizer's state {state} is {short(first.value)}, which is not made of one element per parameter "
            "element: it is left out."
        )


def _add_vectors(pieces: Pieces, state: str, nodes: dict[int, Node], first: StoredTensor) -> None:
    """Slices of the group's vector, or (the momentum of Muon, which needs matrices) whole parameters.

    Where both have the same lengths no parameter is cut and they are the same.
    """
    used, room = pieces.group.used, pieces.group.room
    lengths = {rank: node.tensor().elements for rank, node in nodes.items()}
    sliced = all(length in (used[rank], room[rank]) for rank, length in lengths.items())
    whole = not sliced and all(length == pieces.whole(rank) for rank, length in lengths.items())
    vectors: list[StoredTensor] = [first] * len(used)
    for rank, node in nodes.items():
        vectors[rank] = vector(node, (lengths[rank],) if whole else (used[rank], room[rank]))
    require_one_dtype(pieces, [nodes.get(rank, nodes[min(nodes)]) for rank in range(len(vectors))], vectors)
    if whole:
        pieces.add_whole(state, {rank: vectors[rank] for rank in sorted(nodes)})
    else:
        pieces.add_flat(state, vectors)


def _is_number(state: str, node: Node) -> bool:
    value = node.value
    if isinstance(value, StoredTensor):
        return not value.shape or state == STEP
    return isinstance(value, bool | int | float) or state == STEP


def step_of(files: Files, node: Node) -> float:
    """The optimizer's step, which a training run can reach."""
    number = number_of(files, node)
    if not 0 <= number <= 2**53:
        raise node.fail(f"is {number} where the optimizer's step is expected")
    return number


def number_of(files: Files, node: Node) -> int | float | bool:
    """A number, or a tensor of one element as a number."""
    value = node.value
    if isinstance(value, StoredTensor) and value.elements == 1:
        value = read_scalar(files, value)
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST):
        return value
    raise node.fail(f"is {short(value)} where a number is expected")
