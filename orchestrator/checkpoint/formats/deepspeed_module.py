"""The module's side of a DeepSpeed checkpoint: buffers, parameters not trained, tied names, training dtypes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.checkpoint.archive import StoredTensor
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.deepspeed_flat import Held, Parameter, Shape
from orchestrator.checkpoint.formats.deepspeed_zero3 import frozen_tensor
from orchestrator.checkpoint.formats.pickled_values import Node, short
from orchestrator.checkpoint.layout import Box, Chunk


@dataclass(slots=True)
class Module:
    """What the model files of one model-parallel rank (or of all stages of a pipeline) say."""

    values: dict[str, Node] = field(default_factory=dict)
    """Names -> tensors of the module's state dict, in its order."""
    buffers: set[str] | None = None
    """Names of buffers; None where the files do not say."""
    shared: dict[str, str] = field(default_factory=dict)
    """Tied name -> the name that is stored."""
    frozen_shapes: dict[str, Shape] = field(default_factory=dict)
    fragments: dict[str, list[Node]] = field(default_factory=dict)
    """Parameter that is not trained -> its part from every data-parallel rank, or its whole value."""

    def take(self, model: Node, names: Iterable[tuple[str, Node]]) -> None:
        """Add what one model file says; `names` are its module's members."""
        self.take_values(names)
        buffers = model.find("buffer_names")
        if buffers is not None:
            self.buffers = (self.buffers or set()) | {_text(one) for one in buffers.items()}
        for name, shape in _members(model, "frozen_param_shapes"):
            self.frozen_shapes[name] = shape.shape(name)

    def take_values(self, members: Iterable[tuple[str, Node]]) -> None:
        """Add tensors of the module's state dict; the first of a name stays."""
        for name, node in members:
            self.values.setdefault(name, node)

    def take_shared(self, model: Node) -> None:
        """Add the tied names that a model file lists."""
        for alias, owner in _members(model, "shared_params"):
            self.shared[alias] = _text(owner)

    def take_fragments(self, ranks: Sequence[Node]) -> None:
        """Add every data-parallel rank's part of what is not trained."""
        for name in self.frozen_shapes:
            parts = [found.find(name) if (found := rank.find("frozen_param_fragments")) else None for rank in ranks]
            present = [part for part in parts if part is not None]
            if len(present) == len(ranks):
                self.fragments[name] = present


def _text(node: Node) -> str:
    if not isinstance(node.value, str) or not node.value:
        raise node.fail(f"is {short(node.value)} where a name is expected")
    return node.value


def _members(model: Node, key: str) -> Iterable[tuple[str, Node]]:
    found = model.find(key)
    return () if found is None else found.named()


def stored(files: Files, node: Node, name: str) -> Held:
    """A tensor of a module as it lies in its file."""
    found = node.tensor(name)
    chunk = Chunk(Box.whole(found.shape), found.file, found.begin, strides=found.strides)
    return Held(found.dtype, found.shape, (chunk,) if found.elements else ())


def complete(
    files: Files, module: Module, parameters: dict[str, Parameter], *, partitioned: bool, notes: list[str]
) -> dict[str, str]:
    """Add buffers, parameters that are not trained and training dtypes to `parameters`; returns the tied names.

    `partitioned`: the module's weights are placeholders (ZeRO 3). Tied names never become parameters.
    """
    aliases = _aliases(module, parameters, partitioned=partitioned)
    lost: list[str] = []
    for name, shape in module.frozen_shapes.items():
        whole = not partitioned and name in module.values
        if name in module.fragments and name not in parameters and name not in aliases and not whole:
            held = frozen_tensor(files, name, shape, module.fragments[name])
            parameters[name] = Parameter(shape, frozen=True, training_dtype=held.dtype, tensors={None: held})
    for name, node in module.values.items():
        if not isinstance(node.value, StoredTensor):
            notes.append(f"{name} of the module is {short(node.value)}, not a tensor: it is left out.")
        elif name in parameters:
            _note_dtype(node, parameters[name], name, partitioned=partitioned)
        elif name not in aliases:
            is_buffer = _is_buffer(module, name, node.value)
            if partitioned and not is_buffer and node.value.elements == 0:
                lost += [name] if module.frozen_shapes.get(name, (1,)) != node.value.shape else []
            kind = "buffer" if is_buffer else "parameter"
            held = stored(files, node, name)
            if name not in lost:
                frozen = not is_buffer and (bool(held.chunks) or name in module.frozen_shapes)  # else not optimized
                parameters[name] = Parameter(held.shape, kind, frozen, held.dtype, {None: held})
    lost += [name for name in module.frozen_shapes if name not in parameters and name not in aliases]
    lost += [name for name in module.buffers or () if name not in parameters]
    if lost:
        notes.append(f"The checkpoint does not hold the values of {listed(sorted(set(lost)))}.")
    return aliases


def _is_buffer(module: Module, name: str, value: StoredTensor) -> bool:
    if module.buffers is not None:
        return name in module.buffers
    return name not in module.frozen_shapes and bool(module.frozen_shapes or value.dtype[0] not in "FB")


def _note_dtype(node: Node, parameter: Parameter, name: str, *, partitioned: bool) -> None:
    value = node.tensor(name)
    if not partitioned and value.shape != parameter.shape:
        raise node.fail(f"has shape {list(value.shape)} where param_shapes says {list(parameter.shape)}", name)
    if parameter.training_dtype is None:
        parameter.training_dtype = value.dtype


def _aliases(module: Module, parameters: Mapping[str, Parameter], *, partitioned: bool) -> dict[str, str]:
    """Tied name -> the name that is stored, as the files say and as names in a module that share their bytes show.

    Parameters without elements all seem to be one to DeepSpeed: they are no aliases.
    """
    known = parameters.keys() | module.values.keys() | module.frozen_shapes.keys()
    aliases: dict[str, str] = {}
    for alias in module.shared:
        owner = alias
        for _ in range(len(module.shared)):
            owner = module.shared.get(owner, owner)
        if owner != alias and owner in known and alias not in parameters and owner not in module.shared:
            node = module.values.get(alias)
            if partitioned or node is None or not isinstance(node.value, StoredTensor) or node.value.elements:
                aliases[alias] = owner
    if not partitioned:
        aliases |= shared_storage(module, parameters)
    return aliases


def shared_storage(module: Module, parameters: Mapping[str, Parameter]) -> dict[str, str]:
    """Names of the module, buffers apart, of tensors that are the same bytes -> the first of them (or the trained)."""
    owners: dict[tuple[str, int, str, Shape], str] = {}
    for trained in (True, False):
        for name, node in module.values.items():
            place = _place(node)
            if place is not None and (name in parameters) == trained and name not in (module.buffers or ()):
                owners.setdefault(place, name)
    return {
        name: owner
        for name, node in module.values.items()
        if name not in parameters
        and name not in (module.buffers or ())
        and (place := _place(node)) is not None
        and (owner := owners[place]) != name
    }


def _place(node: Node) -> tuple[str, int, str, Shape] | None:
    value = node.value
    if not isinstance(value, StoredTensor) or not value.elements:
        return None
    return value.file, value.begin, value.dtype, value.shape


def listed(names: Sequence[str]) -> str:
    """The first few names, for notes and errors."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
