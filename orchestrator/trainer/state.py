"""Training state by name: parameters, buffers and optimizer states as they appear in a checkpoint.

Parameter `P` is stored under its full-model name, its optimizer states as `P.<state>`, buffers under their name. With
pipeline parallelism a rank tracks the modules of its own stages, whose names must be those of the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from orchestrator.core.errors import InvalidInput

Kind = Literal["parameter", "buffer", "state"]
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""Name segments that torch.compile and activation checkpointing put in."""


class Stateful(Protocol):
    """A scheduler or the like; `state_dict` must be JSON-able."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take over the state."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One logical tensor, as far as it is on this rank."""

    parameter: str
    state: str | None
    kind: Kind
    tensor: torch.Tensor

    @property
    def name(self) -> str:
        """`P` or `P.<state>`."""
        return self.parameter if self.state is None else f"{self.parameter}.{self.state}"


class Tracked:
    """The model, optimizer and extra objects that make up the training state."""

    def __init__(
        self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None, extra: Mapping[str, Stateful]
    ) -> None:
        self.optimizer = optimizer
        self.extra = dict(extra)
        self.parameters: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        for module in modules:
            self._collect(module)
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}

    def _collect(self, module: nn.Module) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        for name, parameter in module.named_parameters():
            if (name := clean(name)) in self.parameters:
                raise InvalidInput(f"two tracked modules have a parameter {name}: use the names of the whole model")
            self.parameters[name] = parameter
        for name, value in module.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.buffers[clean(name)] = value

    def entries(self) -> Iterator[Entry]:
        """All logical tensors of this rank in a fixed order."""
        for name, parameter in self.parameters.items():
            yield Entry(name, None, "parameter", parameter.detach())
        for name, buffer in self.buffers.items():
            yield Entry(name, None, "buffer", buffer)
        for name, parameter in self._optimized():
            for state, value in sorted(self._state_of(parameter).items()):
                if isinstance(value, torch.Tensor):
                    yield Entry(name, state, "state", value)
                elif value is not None:
                    raise InvalidInput(
                        f"optimizer state {state!r} of {name} is a {type(value).__name__}, which a checkpoint cannot "
                        "hold: keep it as a tensor"
                    )

    def _optimized(self) -> Iterator[tuple[str, torch.Tensor]]:
        for group in self._groups():
            for parameter in group["params"]:
                yield self._name(parameter), parameter

    def _name(self, parameter: torch.Tensor) -> str:
        try:
            return self.names[id(parameter)]
        except KeyError:
            raise InvalidInput(
                f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the tracked model: "
                "build the optimizer after the model is sharded, from the same modules"
            ) from None

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups if self.optimizer is not None else []

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        assert self.optimizer is not None, "only an optimizer has states"
        return self.optimizer.state.get(parameter, {})

    # ------------------------------------------------------------ what is not a tensor

    def json_state(self) -> dict[str, Any]:
        """Hyper-parameters by group, with the parameters' names, and the state of the extra objects."""
        groups = []
        for group in self._groups():
            values = {key: jsonable(value) for key, value in group.items() if key != "params"}
            kept = {key: value for key, value in values.items() if value is not None}
            groups.append({**kept, "params": [self._name(parameter) for parameter in group["params"]]})
        return {"param_groups": groups, "extra": {name: _state_dict(name, item) for name, item in self.extra.items()}}

    def load_json_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `json_state`; hyper-parameters that the checkpoint does not know stay as they are."""
        for group, stored in zip(self._groups(), state.get("param_groups", []), strict=False):
            for key, value in stored.items():
                if key in group and key != "params":
                    group[key] = _like(group[key], value)
        for name, item in self.extra.items():
            if name not in state.get("extra", {}):
                raise InvalidInput(
                    f"the checkpoint has no state for {name!r} given to session.track: it holds {list(state['extra'])}"
                )
            item.load_state_dict(state["extra"][name])

    def create_states(self, states: Iterable[tuple[str, str, torch.dtype, tuple[int, ...]]]) -> None:
        """Give the optimizer zeroed states `(parameter, state, dtype, logical shape)`, sharded like their parameter."""
        if self.optimizer is None:
            return
        owned = dict(self._optimized())
        group_of = {id(parameter): group for group in self._groups() for parameter in group["params"]}
        for name, state, dtype, shape in states:
            if (parameter := owned.get(name)) is not None:
                on_device = any(group_of[id(parameter)].get(flag) for flag in ("capturable", "fused"))
                self.optimizer.state[parameter][state] = _zeros(parameter, dtype, shape, on_device=on_device)


def clean(name: str) -> str:
    """`name` without the segments that wrappers put in."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _zeros(parameter: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, on_device: bool) -> torch.Tensor:
    if tuple(parameter.shape) == shape and shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype, device=parameter.device if on_device or shape else "cpu")


def jsonable(value: Any) -> Any:
    """`value` as JSON keeps it, or None when it is no plain data (a one-element tensor counts as a number)."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None


def _like(old: Any, new: Any) -> Any:
    """`new` in the type that `old` had before JSON."""
    if isinstance(old, torch.Tensor):
        return old.fill_(new)
    return tuple(new) if isinstance(old, tuple) else new


def _state_dict(name: str, item: Stateful) -> dict[str, Any]:
    state = item.state_dict()
    try:
        kept: dict[str, Any] = json.loads(json.dumps(state))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"the state of {name!r} given to session.track is not plain data: {error}") from error
    return kept
