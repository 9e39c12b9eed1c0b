"""From the keys of a state dict to the universal view: which tensor is whose weight, moment or step. No torch."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from functools import partial
from typing import Any

from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.dcp_keys import (
    Names,
    Optimizer,
    embed,
    find_optimizers,
    is_statistic,
    lone_model_prefix,
    model_prefixes,
    plain,
)
from orchestrator.checkpoint.formats.dcp_metadata import Inventory, Saved
from orchestrator.checkpoint.formats.dcp_values import Unread, Values, jsonable, with_lists
from orchestrator.checkpoint.layout import Box, Chunk, LogicalTensor, tensor_name
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "C64")


class Naming:
    """From keys of a state dict to universal names."""

    def __init__(self, files: Files, inventory: Inventory) -> None:
        self.files, self.inventory = files, inventory
        self.label = inventory.label
        self.notes = list(inventory.notes)
        self.values = Values(files, inventory)
        self.plain = self.values.plain()
        keys = inventory.paths if inventory.paths else (*inventory.tensors, *inventory.blobs)
        everything = dict.fromkeys((*keys, *inventory.tensors, *inventory.blobs))
        self.optimizers = find_optimizers(everything, inventory.paths)
        taken = {key for optimizer in self.optimizers for key in optimizer.used()}
        self.free = [key for key in everything if key in inventory.tensors and key not in taken]
        self.rest = [key for key in everything if key in inventory.blobs and key not in taken]
        self.tensors: dict[str, LogicalTensor] = {}
        self.numbers: dict[str, dict[int, str]] = {}
        """Optimizer -> number of a parameter -> its name, where the optimizer numbers them."""
        self.trained: set[str] = set()
        self.claimed: set[str] = set()
        """Keys of the model that an optimizer trains."""
        self.steps: list[float] = []
        self.groups: list[dict[str, Any]] = []

    def view(self) -> UniversalView:
        """Everything put together."""
        prefixes = [self._prefix(optimizer) for optimizer in self.optimizers]
        self.names = self._name_model(prefixes)
        frozen = self._add_model()
        for optimizer, prefix in zip(self.optimizers, prefixes, strict=True):
            self._add_optimizer(optimizer, prefix)
        self._report_frozen(frozen)
        if not self.tensors:
            raise CheckpointError(
                f"{self.label} holds no tensors of its own: save with a planner that flattens state dicts, as torch's "
                "does unless it is told otherwise"
            )
        state: dict[str, Any] = self._state()
        if self.groups:
            state["param_groups"] = self.groups
        return UniversalView(
            self.files,
            step=int(max(self.steps, default=0)),
            generation=0,
            state=state,
            tensors=self.tensors,
            source="dcp",
            frozen=frozen,
            notes=self.notes,
        )

    # ------------------------------------------------------------ names

    def _prefix(self, optimizer: Optimizer) -> str | None:
        """What the keys of the optimizer's model begin with; numbered parameters get their names here."""
        listed = self._listed(optimizer)
        unlisted = not listed and not optimizer.flattened and bool(optimizer.states)
        if any(type(one) is int for one in listed) or (unlisted and all(one.isdigit() for one in optimizer.states)):
            prefix = self._lone_prefix()
            self._replace_numbers(optimizer, prefix, [one for one in listed if type(one) is int])
            return prefix
        names = list(dict.fromkeys((*map(str, listed), *optimizer.states, *optimizer.flattened)))
        keys = [key for key in self.free if key not in self.claimed]
        found = model_prefixes(names, keys, optimizer.root, partial(self._fits, optimizer))
        if len(found) > 1 and len(self.optimizers) > 1:
            raise CheckpointError(
                f"{self.label} does not tell which of {_models(found)} the optimizer {optimizer.root.rstrip('.')} "
                "trains, which have parameters of the same names and shapes: save each model and its optimizer in one "
                'dictionary, as {"model": ..., "optim": ...}'
            )
        if found:
            own = {plain(found[0] + name) for name in names}
            self.claimed.update(key for key in keys if plain(key) in own)
        return found[0] if found else None

    def _fits(self, optimizer: Optimizer, name: str, key: str) -> bool:
        """Whether the tensor at the key can be the optimizer's parameter, by the shapes of the parameter's states."""
        tensors = self.inventory.tensors
        states = [tensors[one].shape for one in optimizer.states.get(name, {}).values() if one in tensors]
        solid = [shape for shape in states if shape]
        return not solid or tensors[key].shape in solid or len(self.optimizers) == 1

    def _lone_prefix(self) -> str:
        return lone_model_prefix(self.free, self.inventory.paths)

    def _listed(self, optimizer: Optimizer) -> list[Any]:
        """The parameters of all groups, as the groups list them."""
        return [one for group in self._raw_groups(optimizer) for one in group.get("params", [])]

    def _raw_groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The groups as they were saved (not flattened ones), each with a list as `params`."""
        if optimizer.whole is not None:
            groups = self._readable(optimizer.whole)
        else:
            groups = [
                {name: self._value(key) for name, key in members.items()}
                for _, members in sorted(optimizer.indexed.items())
            ]
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise corrupt(self.label, "its parameter groups are not a list of mappings", optimizer.whole)
        for group in groups:
            listed = group.get("params", [])
            if not isinstance(listed, list) or not all(type(one) in (int, str) for one in listed):
                raise corrupt(self.label, "a parameter group's params are not a list of names", optimizer.root)
        return groups

    def _value(self, key: str) -> Any:
        """A hyper-parameter, which may be a tensor of one element."""
        if key in self.inventory.tensors:
            return self.values.scalars([key]).get(key)
        return self._readable(key)

    def _readable(self, key: str) -> Any:
        """A plain value of the optimizer, which cannot be done without."""
        value = self.plain.get(key)
        if isinstance(value, Unread):
            raise corrupt(self.label, f"it {value.why}", key)
        return value

    def _replace_numbers(self, optimizer: Optimizer, prefix: str, listed: list[int]) -> None:
        """Give the parameters of a plain `Optimizer.state_dict` their names, if it is certain which they are."""
        if any(not number.isdigit() or len(number) > 18 for number in optimizer.states):
            raise corrupt(self.label, "its optimizer numbers some parameters and names others", optimizer.root)
        named = self._param_names(optimizer)
        ids = sorted({*listed, *map(int, optimizer.states)})
        if named is None:
            named = self._by_order(optimizer, prefix, ids)
        if named is None or not all(one in named for one in ids):
            raise CheckpointError(
                f"{self.label} numbers the parameters of its optimizer and does not tell their names, and its model's "
                "order does not settle them: save get_optimizer_state_dict(model, optimizer) of "
                "torch.distributed.checkpoint.state_dict instead of optimizer.state_dict()"
            )
        optimizer.states = {named[int(number)]: states for number, states in optimizer.states.items()}
        self.numbers[optimizer.root] = named

    def _param_names(self, optimizer: Optimizer) -> dict[int, str] | None:
        """Names that the optimizer was given itself."""
        found: dict[int, str] = {}
        for group in self._raw_groups(optimizer):
            names, numbers = group.get("param_names"), group.get("params", [])
            if not isinstance(names, list) or len(names) != len(numbers):
                return None
            found.update((number, str(name)) for number, name in zip(numbers, names, strict=True))
        return found or None

    def _by_order(self, optimizer: Optimizer, prefix: str, ids: list[int]) -> dict[int, str] | None:
        """Names by the order of the model's parameters, if the shapes fit in one way only."""
        ordered = bool(self.inventory.paths) and len(self._raw_groups(optimizer)) == 1
        if not ordered or ids != list(range(len(ids))):
            return None  # several groups are numbered one after the other, whatever the model's order
        tensors = self.inventory.tensors
        keys = [key for key in self.free if key.startswith(prefix) and not self._buffer(key)]
        wanted: list[tuple[int, ...] | None] = []
        for one in ids:
            shapes = [tensors[key].shape for key in optimizer.states.get(str(one), {}).values() if key in tensors]
            wanted.append(max(shapes, key=lambda shape: (math.prod(shape), len(shape)), default=None))
        found = embed(wanted, [tensors[key].shape for key in keys])
        if found is None:
            return None
        self.notes.append(
            "Its optimizer numbers the parameters; their names follow from the model's order, in which the shapes of "
            "the optimizer's states fit in one way only."
        )
        return {one: plain(keys[at][len(prefix) :]) for one, at in zip(ids, found, strict=True)}

    def _name_model(self, prefixes: list[str | None]) -> Names:
        names = Names(self.free, prefixes, self._lone_prefix())
        if names.repeated:
            self.notes.append(
                f"{names.repeated} names without their prefix would be repeated: all keep the keys they had."
            )
        return names

    # ------------------------------------------------------------ tensors

    def _add_model(self) -> set[str]:
        """Add what is no optimizer's; returns the names of the model's floating-point tensors."""
        tensors = self.inventory.tensors
        floats = set()
        for key, name in self.names.by_key.items():
            within = key.startswith(self.names.models)
            buffer = not within or self._buffer(key)
            self._add(name, None, "buffer" if buffer else "parameter", tensors[key])
            if not buffer:
                floats.add(name)
        return floats

    def _buffer(self, key: str) -> bool:
        """Whether a model's tensor is certainly no parameter."""
        return self.inventory.tensors[key].dtype not in _FLOATS or is_statistic(key, self.inventory.tensors)

    def _add(self, parameter: str, state: str | None, kind: str, saved: Saved) -> None:
        name = tensor_name(parameter, state)
        if name in self.tensors:
            raise CheckpointError(f"{self.label} holds two tensors that are both {name}: save them under other keys")
        self.tensors[name] = LogicalTensor(name, parameter, state, kind, saved.dtype, saved.shape, saved.chunks)

    def _add_optimizer(self, optimizer: Optimizer, prefix: str | None) -> None:
        members = {name: self.names.parameter(name, prefix) for name in optimizer.states}
        steps = self._read_steps(optimizer)
        for name, states in optimizer.states.items():
            parameter = members[name]
            for state, key in states.items():
                if key in steps:
                    self.steps.append(steps[key])
                    chunk = Chunk(Box((), ()), "", 0, data=struct.pack("<f", steps[key]))
                    self._add(parameter, state, "state", Saved("F32", (), (chunk,)))
                elif key in self.inventory.tensors:
                    self._add(parameter, state, "state", self.inventory.tensors[key])
                else:
                    self.rest.append(key)
        self._add_groups(optimizer, prefix, members)
        listed = {name for group in self.groups for name in group["params"]}
        self.trained |= set(members.values()) if members else listed

    def _read_steps(self, optimizer: Optimizer) -> dict[str, float]:
        """Key -> number of steps that a parameter has seen."""
        keys = [states["step"] for states in optimizer.states.values() if "step" in states]
        tensors = self.inventory.tensors
        found = self.values.scalars(key for key in keys if key in tensors and tensors[key].shape == ())
        numbers = {key: self.plain[key] for key in keys if type(self.plain.get(key)) in (int, float)}
        steps = {key: float(value) for key, value in (found | numbers).items()}
        for key, value in steps.items():
            if not 0 <= value < 2**53:
                raise corrupt(self.label, f"its step is {value}", key)
        return steps

    # ------------------------------------------------------------ groups and other state

    def _add_groups(self, optimizer: Optimizer, prefix: str | None, members: dict[str, str]) -> None:
        groups = self._flattened_groups(optimizer) if optimizer.flattened else self._raw_groups(optimizer)
        added = []
        for group in groups:
            numbers = self.numbers.get(optimizer.root, {})
            names = [self.names.parameter(numbers.get(one, one), prefix) for one in group.get("params", [])]
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            added.append({**self._jsonable(settings, f"{optimizer.root}param_groups"), "params": names})
        listed = {name for group in added for name in group["params"]}
        missing = [name for name in members.values() if name not in listed]
        if missing and len(added) == 1:
            # Pipeline stages each save their own list under the same key, of which one is kept.
            added[0]["params"] += missing
            self.notes.append(f"{len(missing)} parameters with optimizer states are in no group's list: they are added "
                              "to the one group there is.")  # fmt: skip
        elif missing and added:
            self.notes.append(f"{len(missing)} parameters with optimizer states are in no group, {missing[0]} for one: "
                              "the source does not tell their hyper-parameters.")  # fmt: skip
        self.groups += added

    def _flattened_groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Parameters with equal hyper-parameters are a group."""
        found: dict[str, dict[str, Any]] = {}
        tensors = [
            key for keys in optimizer.flattened.values() for key in keys.values() if key in self.inventory.tensors
        ]
        scalars = self.values.scalars(tensors)
        for parameter, keys in optimizer.flattened.items():
            settings = {name: scalars[key] if key in scalars else self._readable(key) for name, key in keys.items()}
            group = found.setdefault(repr(sorted(settings.items())), {**settings, "params": []})
            group["params"].append(parameter)
        return list(found.values())

    def _jsonable(self, settings: dict[str, Any], where: str) -> dict[str, Any]:
        kept = {}
        for key, value in settings.items():
            try:
                kept[str(key)] = jsonable(value)
            except TypeError as error:
                self.notes.append(f"{where}.{key} is left out: {error}.")
        return kept

    def _state(self) -> dict[str, Any]:
        """Plain values, nested as they were."""
        state: dict[str | int, Any] = {}
        for key in self.rest:
            kept = self._jsonable({key: self.plain[key]}, "The value")
            path = self.inventory.paths.get(key, (key,))
            for value in kept.values():
                holder = state
                for part in path[:-1]:
                    holder = holder.setdefault(part, {})
                    if not isinstance(holder, dict):
                        raise corrupt(self.label, "its path goes through a value", key)
                holder[path[-1]] = value
        return {str(key): with_lists(value) for key, value in state.items()}

    def _report_frozen(self, floats: set[str]) -> None:
        """Reduce `floats` to the frozen parameters: those that no optimizer has a state of."""
        floats -= self.trained
        if not self.optimizers:
            floats.clear()
        elif floats:
            self.notes.append(
                f"{_some(floats)} without an optimizer state: read as frozen parameters, though they may be buffers or "
                "other names of trained parameters, which such a checkpoint does not tell apart."
            )


def _models(prefixes: Iterable[str]) -> str:
    return " and ".join(prefix.rstrip(".") or "the model" for prefix in prefixes)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return f"{listed[0]} is" if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more are"
