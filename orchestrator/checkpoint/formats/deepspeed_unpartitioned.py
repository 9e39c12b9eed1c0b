"""DeepSpeed without ZeRO: the optimizer's state is in the model file, by number instead of by name.

An optimizer numbers its parameters group after group; a group usually takes some of the module's parameters in their
order. So names follow from shapes, from the master weights (which round to the module's) where there are some, and from
every parameter being in one group. Where several assignments fit, none is chosen: a wrong one would pair weights with
the moments of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod

import numpy as np

from orchestrator.checkpoint.archive import StoredTensor
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.deepspeed_experts import is_of_expert
from orchestrator.checkpoint.formats.deepspeed_flat import (
    STEP,
    FlatGroup,
    Held,
    Parameter,
    Pieces,
    Slice,
    add_states,
    add_values,
    number_of,
    scalar,
    step_of,
)
from orchestrator.checkpoint.formats.deepspeed_module import Module, listed, shared_storage, stored
from orchestrator.checkpoint.formats.pickled_values import Node
from orchestrator.checkpoint.layout import ITEM_BYTES
from orchestrator.checkpoint.numbers import FLOATS, items, numbers
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint

MAX_POSITIONS = 2_000
"""Partial assignments that are kept at a time before the names count as unknown."""
SAMPLE = 256
"""Elements of a master weight that are compared with the module's."""

Group = dict[str, Parameter]
_Positions = tuple[int, ...]
_State = tuple[bool, _Positions]
"""Whether the last name was taken, and where the queues are."""


@dataclass(frozen=True, slots=True)
class _Queue:
    """The parameters of a group that still need a name: what is at `position` fits a name or not."""

    end: int
    fits: Callable[[int, str], bool]


class Unpartitioned:
    """The optimizer inside a model file."""

    def __init__(self, files: Files, optimizer: Node, module: Module, notes: list[str]) -> None:
        self.files, self.optimizer, self.module, self.notes = files, optimizer, module, notes
        inner = optimizer.find("optimizer_state_dict") or optimizer
        self.groups = inner.at("param_groups")
        self.states = inner.at("state")
        shared = shared_storage(module, {})
        buffers = module.buffers or set()
        self.names = [
            name
            for name, node in module.values.items()
            if name not in buffers and name not in shared and isinstance(node.value, StoredTensor)
        ]

    def read(self) -> list[Group]:
        """The parameters of each group, in order; raises `CheckpointError` when their names cannot be told."""
        if flats := self.optimizer.find("fp32_groups_flat"):
            return self._flat(flats)
        ids = [[one.count() for one in group.at("params").items()] for group in self.groups.items()]
        masters = self._masters(ids)
        queues = [self._queue(group, masters, mark) for group, mark in zip(ids, self._marks(), strict=True)]
        found = []
        for group, names in zip(ids, self._named(queues, lambda name: 1), strict=True):
            pairs = zip(group, names, strict=True)
            found.append({name: self._parameter(one, name, masters.get(one)) for one, name in pairs})
        for parameters, hyper in zip(found, self.groups.items(), strict=True):
            self._add_step(parameters, hyper)
        return found

    # ------------------------------------------------------------ names

    def _masters(self, ids: Sequence[Sequence[int]]) -> dict[int, Node]:
        groups = self.optimizer.find("fp32_groups")
        if groups is None:
            return {}
        found: dict[int, Node] = {}
        for index, group in enumerate(ids):
            members = groups.at(index).items()
            if len(members) != len(group):
                raise groups.fail(f"has {len(members)} tensors in group {index} where it has {len(group)} parameters")
            found.update(zip(group, members, strict=True))
        return found

    def _marks(self) -> list[bool | None]:
        """Of each group whether its parameters are experts'; None where no group says so."""
        marks = [(found := group.find("moe")) is not None and found.value is True for group in self.groups.items()]
        return list(marks) if any(marks) else [None for _ in marks]

    def _queue(self, ids: Sequence[int], masters: dict[int, Node], of_experts: bool | None) -> _Queue:
        def fits(position: int, name: str) -> bool:
            one = ids[position]
            if of_experts not in (None, is_of_expert(name)):
                return False
            shape = self.module.values[name].value.shape
            if one in masters:
                master = masters[one].tensor()
                return master.shape == shape and (master.strides is not None or self._rounds(name, master, 0))
            state = self.states.find(one)
            return state is None or all(
                _fits(key, node.value.shape, shape)
                for key, node in state.named()
                if isinstance(node.value, StoredTensor) and node.value.shape
            )

        return _Queue(len(ids), cache(fits))

    def _rounds(self, name: str, master: StoredTensor, start: int) -> bool:
        """Whether the master weight, from its element `start` on, rounds to the module's."""
        weight = self.module.values[name].tensor(name)
        if weight.strides is not None or weight.dtype not in FLOATS or master.dtype not in FLOATS:
            return True
        count = min(weight.elements, SAMPLE)
        for at in {0, weight.elements - count}:
            exact = numbers(self._bytes(master, start + at, count), master.dtype)
            if items(exact, weight.dtype).tobytes() != self._bytes(weight, at, count).tobytes():
                return False
        return True

    def _bytes(self, tensor: StoredTensor, start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        item = ITEM_BYTES[tensor.dtype]
        data = bytearray(count * item)
        self.files.read_into(tensor.file, tensor.begin + start * item, memoryview(data))
        return np.frombuffer(data, np.uint8)

    def _named(self, queues: Sequence[_Queue], size: Callable[[str], int]) -> list[list[str]]:
        """The names of each queue's members, in order; `size` is how far a name moves a queue's position."""
        names = [name for name in self.names if size(name)]
        ways = _ways(names, queues, size)
        if len(ways) > 1:
            ways = _ways(names, queues, size, whole_modules=True) or ways
            if len(ways) == 1:
                self.notes.append(
                    "The optimizer's parameters are numbered, not named: they are taken to be those of modules that "
                    "are trained as a whole, in the module's order."
                )
        if len(ways) == 1:
            return ways[0]
        several = "are several ways" if ways else "is no way"
        raise CheckpointError(
            f"{self.optimizer.label} numbers the optimizer's parameters, and there {several} to name them "
            f"({listed(self.names)}): save with ZeRO 1, which names them, or with named parameters"
        )

    # ------------------------------------------------------------ tensors

    def _parameter(self, one: int, name: str, master: Node | None) -> Parameter:
        value = stored(self.files, self.module.values[name], name)
        parameter = Parameter(value.shape, training_dtype=value.dtype)
        parameter.tensors[None] = value if master is None else stored(self.files, master, name)
        state = self.states.find(one)
        for key, node in () if state is None else state.named():
            held = self._state(key, node, name)
            if held is not None:
                parameter.tensors[key] = held
        return parameter

    def _state(self, key: str, node: Node, name: str) -> Held | None:
        value = node.value
        if value is None:
            return None
        if key == STEP:
            return scalar(STEP, step_of(self.files, node))
        if isinstance(value, StoredTensor):
            return stored(self.files, node, name)
        if isinstance(value, bool | int | float):
            return scalar(key, number_of(self.files, node))
        self.notes.append(f"The optimizer's state {key} is not a tensor or number: it is left out.")
        return None

    def _add_step(self, parameters: Group, group: Node) -> None:
        step = group.find(STEP)
        if step is not None and not any(STEP in parameter.tensors for parameter in parameters.values()):
            held = scalar(STEP, step_of(self.files, step))
            for parameter in parameters.values():
                parameter.tensors[STEP] = held

    # ------------------------------------------------------------ flat groups

    def _flat(self, flats: Node) -> list[Group]:
        """Fused fp16 or bf16 optimizers: one master vector per group."""
        vectors = [node.tensor() for node in flats.items()]
        marks = self._marks()
        if len(marks) != len(vectors):
            raise flats.fail(f"has {len(vectors)} vectors for {len(marks)} parameter groups")
        queues = [self._flat_queue(vector, mark) for vector, mark in zip(vectors, marks, strict=True)]
        found = []
        for index, names in enumerate(self._named(queues, self._size)):
            shapes = {name: self.module.values[name].tensor(name).shape for name in names}
            slices, offset = {}, 0
            for name, shape in shapes.items():
                slices[name] = [Slice(0, offset, 0, prod(shape))] if prod(shape) else []
                offset += prod(shape)
            parameters = {
                name: Parameter(shape, training_dtype=self.module.values[name].value.dtype)
                for name, shape in shapes.items()
            }
            pieces = Pieces(self.files, FlatGroup(shapes, slices, (offset,), (offset,)), parameters)
            add_values(pieces, [flats.at(index)])
            add_states(pieces, [self.states.find(index)], self.notes)
            self._add_step(parameters, self.groups.at(index))
            found.append(parameters)
        return found

    def _flat_queue(self, vector: StoredTensor, of_experts: bool | None) -> _Queue:
        def fits(position: int, name: str) -> bool:
            if of_experts not in (None, is_of_expert(name)):
                return False
            return position + self._size(name) <= vector.elements and self._rounds(name, vector, position)

        return _Queue(vector.elements, cache(fits))

    def _size(self, name: str) -> int:
        return prod(self.module.values[name].tensor(name).shape)


def can_be_of(files: Files, optimizer: Node, module: Module) -> bool:
    """Whether the parameters that the optimizer numbers can be named in exactly one way within the module."""
    try:
        Unpartitioned(files, optimizer, module, []).read()
    except CorruptCheckpoint:
        raise
    except CheckpointError:
        return False
    return True


def _fits(state: str, found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a state of this shape can be one of a parameter of that shape: it has its shape, or is factored."""
    if "row" in state:
        return found in (shape[:-1], (*shape[:-1], 1))
    if "col" in state:
        return found in ((*shape[:-2], *shape[-1:]), (*shape[:-2], 1, *shape[-1:]))
    return found == shape


def _ways(
    names: Sequence[str], queues: Sequence[_Queue], size: Callable[[str], int], *, whole_modules: bool = False
) -> list[list[list[str]]]:
    """Ways to give each queue some of the names, in their order, until all queues are at their end; at most two.

    Name by name, all positions that the queues can be at are kept, with one way to get there and whether it is the
    only one. `whole_modules`: the names of a module are all given to queues, or none is. Raises `CheckpointError` when
    there are too many.
    """
    left = [0, *accumulate(map(size, reversed(names)))][::-1]
    total = sum(queue.end for queue in queues)
    reached: dict[_State, int] = {(False, (0,) * len(queues)): 1}
    origins: list[dict[_State, tuple[_State, int]]] = []
    module = ""
    for index, name in enumerate(names):
        same, module = name.rpartition(".")[0] == module != "", name.rpartition(".")[0]
        following: dict[_State, int] = {}
        origin: dict[_State, tuple[_State, int]] = {}
        for (taken, positions), ways in reached.items():
            for number, moved in _moves(positions, name, size(name), queues):
                fits = not (whole_modules and same) or taken == (number >= 0)
                if fits and total - sum(moved) <= left[index + 1]:
                    state = (whole_modules and number >= 0, moved)
                    following[state] = min(2, following.get(state, 0) + ways)
                    origin[state] = (taken, positions), number
        if len(following) > MAX_POSITIONS:
            raise CheckpointError("the optimizer's parameters can be named in too many ways to tell which is right")
        reached = following
        origins.append(origin)
    end = tuple(queue.end for queue in queues)
    ends = [state for state in reached if state[1] == end]
    return [_way(names, origins, state, len(queues)) for state in ends for _ in range(reached[state])][:2]


def _way(
    names: Sequence[str], origins: Sequence[dict[_State, tuple[_State, int]]], state: _State, queues: int
) -> list[list[str]]:
    """The names of each queue on the way that led to `state`."""
    way: list[list[str]] = [[] for _ in range(queues)]
    for name, origin in zip(reversed(names), reversed(origins), strict=True):
        state, number = origin[state]
        if number >= 0:
            way[number].append(name)
    return [found[::-1] for found in way]


def _moves(positions: _Positions, name: str, size: int, queues: Sequence[_Queue]) -> Iterator[tuple[int, _Positions]]:
    """Where the queues can be after a name: one of them took it, or (-1) none."""
    yield -1, positions
    for number, queue in enumerate(queues):
        if positions[number] < queue.end and queue.fits(positions[number], name):
            yield number, (*positions[:number], positions[number] + size, *positions[number + 1 :])
