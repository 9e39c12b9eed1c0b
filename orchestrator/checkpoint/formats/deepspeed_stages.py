"""A DeepSpeed pipeline without ZeRO: each stage's model file has an optimizer that numbers the stage's parameters.

A stage holds consecutive layers, so that what its optimizer trains tells how many. Tied modules come first in a stage,
whichever of its layers they serve. Which modules are tied no file says: their layers' files hold the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from orchestrator.checkpoint.archive import StoredTensor
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.deepspeed_module import Module, listed
from orchestrator.checkpoint.formats.deepspeed_unpartitioned import can_be_of
from orchestrator.checkpoint.formats.pickled_values import Node
from orchestrator.checkpoint.layout import ITEM_BYTES
from orchestrator.core.errors import CheckpointError

FLAT = "fp32_groups_flat"
MAX_UNWRITTEN = 2
"""Modules that are tied though one layer is written, at most."""
MAX_TRIES = 10_000
"""Stages that are looked at before the division counts as unknown."""
SAMPLE = 1024
"""Elements of a layer's tensor that are compared with those of a layer that may be the same."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the pipeline."""

    prefix: str
    """What the names of its tensors begin with in the whole model."""
    tensors: Mapping[str, Node]
    """Local name -> tensor."""

    def names(self) -> list[str]:
        """The names in the whole model."""
        return [self.prefix + name for name in self.tensors]


def tied_layers(files: Files, layers: Sequence[Layer]) -> dict[str, str]:
    """Prefix of a layer -> that of the first layer that is the same module; of layers of which there are several."""
    known: list[tuple[Layer, list[_Sample]]] = []
    owners: dict[str, str] = {}
    for layer in layers:
        samples = [_sample(files, name, node.value) for name, node in layer.tensors.items()]
        owner = next((other for other, held in known if other.prefix == layer.prefix or _same(held, samples)), None)
        if owner is None:
            known.append((layer, samples))
        else:
            owners[layer.prefix] = owners[owner.prefix] = owner.prefix
    return owners


@dataclass(frozen=True, slots=True)
class _Sample:
    """What a layer's tensor is compared by."""

    kind: tuple[object, ...]
    data: bytes
    learnt: bool
    """Whether the elements are not all the same, as those of a new bias or norm are."""


def _sample(files: Files, name: str, tensor: object) -> _Sample:
    if not isinstance(tensor, StoredTensor) or not tensor.elements or tensor.strides is not None:
        return _Sample((name, type(tensor)), b"", learnt=False)
    item = ITEM_BYTES[tensor.dtype]
    data = bytearray(min(tensor.elements, SAMPLE) * item)
    files.read_into(tensor.file, tensor.begin, memoryview(data))
    rows = np.frombuffer(data, np.uint8).reshape(-1, item)
    kind = (name, tensor.shape, tensor.dtype)
    return _Sample(kind, bytes(data), learnt=bool((rows != rows[0]).any()))


def _same(one: Sequence[_Sample], other: Sequence[_Sample]) -> bool:
    """Whether two layers share a tensor that was learnt (a tied module may have others, which one stage trains)."""
    if [sample.kind for sample in one] != [sample.kind for sample in other]:
        return False
    return any(left.learnt and left.data == right.data for left, right in zip(one, other, strict=True))


class Stages:
    """Divides the layers of a pipeline over the optimizers of its stages."""

    def __init__(self, files: Files, optimizers: Sequence[Node], layers: Sequence[Layer], whole: Module) -> None:
        self.files, self.optimizers, self.whole = files, optimizers, whole
        self.layers = [layer for layer in layers if self._parameters([layer])]
        self.sizes = [_size(optimizer) for optimizer in optimizers]
        self.weights = [self._sizes(optimizer.find(FLAT) is not None) for optimizer in optimizers]
        prefixes = [layer.prefix for layer in self.layers]
        self.written = {prefix for prefix in prefixes if prefixes.count(prefix) > 1}
        """Prefixes of modules of which several layers are written."""
        self.tied = self.written
        """Those that are taken to be tied, and so to come first in a stage."""
        self.tries = 0

    def split(self, label: str) -> list[Module]:
        """The part of the whole module that each stage trains, in the order in which its optimizer numbers it.

        A tied module may serve a stage by a function of its own, for which no layer is written: of the ways to add
        such modules the one with the fewest is taken. Raises `CheckpointError` unless there is exactly one.
        """
        ways = next((found for found in self._attempts() if found), [])
        if len(ways) == 1:
            return ways[0]
        names = [name for layer in self.layers for name in self._parameters([layer])]
        raise CheckpointError(
            f"{label} is of a pipeline without ZeRO, whose stages number the parameters that they train, and its "
            f"layers ({listed(names)}) divide into such stages in {'several ways' if ways else 'no way'}: train "
            "without frozen parameters, or save with ZeRO 1, which names them"
        )

    def _attempts(self) -> Iterator[list[list[Module]]]:
        """The different ways for each number of modules that are tied though one layer is written, fewest first."""
        lone = list(dict.fromkeys(layer.prefix for layer in self.layers if layer.prefix not in self.written))
        for count in range(MAX_UNWRITTEN + 1):
            for further in range(count, max(len(self.optimizers), count + 1)):
                found: dict[str, list[Module]] = {}
                for unwritten in combinations(lone, count):
                    self.tied = self.written.union(unwritten)
                    found |= {repr([list(part.values) for part in way]): way for way in self._ways(0, 0, further)}
                yield list(found.values())

    def _ways(self, stage: int, begin: int, further: int) -> Iterator[list[Module]]:
        """Ways to give the layers from `begin` on to the stages from `stage` on, with so many further modules."""
        self._count_try()
        if stage == len(self.optimizers):
            if begin == len(self.layers) and not further:
                yield []
            return
        for end in range(begin, len(self.layers) + 1):
            own = self.layers[begin:end]
            missing = self.sizes[stage] - self._total(stage, own)
            if missing < 0:
                return
            used = int(missing > 0)
            if used <= further:
                for part in self._parts(stage, own, missing):
                    yield from ([part, *rest] for rest in self._ways(stage + 1, end, further - used))

    def _parts(self, stage: int, own: Sequence[Layer], missing: int) -> Iterator[Module]:
        """What a stage of these layers can be; `missing` is the size of the module that is there besides."""
        tied = [layer for layer in own if layer.prefix in self.tied]
        rest = [layer for layer in own if layer.prefix not in self.tied]
        orders = [[*tied, *rest]]
        if missing:
            held = {layer.prefix for layer in own}
            others = {one.prefix: one for one in self.layers if one.prefix in self.tied - held}.values()
            added = [one for one in others if self._total(stage, [one]) == missing]
            orders = [[*tied[:at], one, *tied[at:], *rest] for one in added for at in range(len(tied) + 1)]
        for order in orders:
            part = Module({name: self.whole.values[name] for name in self._parameters(order)}, self.whole.buffers)
            if self._fits(stage, part):
                yield part

    def _fits(self, stage: int, part: Module) -> bool:
        self._count_try()
        return can_be_of(self.files, self.optimizers[stage], part)

    def _count_try(self) -> None:
        self.tries += 1
        if self.tries > MAX_TRIES:
            raise CheckpointError(
                f"{self.optimizers[0].label} is of a pipeline without ZeRO, whose layers divide into stages in too "
                "many ways to tell which is right: save with ZeRO 1, which names the parameters"
            )

    def _parameters(self, layers: Sequence[Layer]) -> dict[str, None]:
        buffers = self.whole.buffers or set()
        return dict.fromkeys(name for layer in layers for name in layer.names() if name not in buffers)

    def _total(self, stage: int, layers: Sequence[Layer]) -> int:
        return sum(self.weights[stage][prefix] for prefix in {layer.prefix for layer in layers})

    def _sizes(self, flat: bool) -> dict[str, int]:
        """Of each module how many parameters it has; elements for an optimizer that flattens them."""
        values = self.whole.values
        return {
            layer.prefix: sum(values[name].tensor(name).elements if flat else 1 for name in self._parameters([layer]))
            for layer in self.layers
        }


def _size(optimizer: Node) -> int:
    """How many parameters an optimizer trains; elements where it flattens them."""
    if flats := optimizer.find(FLAT):
        return sum(node.tensor().elements for node in flats.items())
    inner = optimizer.find("optimizer_state_dict") or optimizer
    return sum(len(group.at("params").items()) for group in inner.at("param_groups").items())
