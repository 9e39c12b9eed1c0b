"""From the keys of a user's state dict to a view's tensors and values. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from orchestrator.checkpoint.formats.dcp_keys import MODEL_KEYS, KeyPath, plain
from orchestrator.checkpoint.formats.dcp_target import as_torch, flatten, tensors, values
from orchestrator.checkpoint.layout import tensor_name
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

DECISIVE = ("lr", "betas", "eps", "weight_decay", "momentum")
"""Settings without which training would silently go on otherwise: a checkpoint must have them if they are asked for.

Others, such as `foreach`, stay as they are where the checkpoint does not know them.
"""
_STATE = re.compile(r"(?:^|\.)state\.")
_GROUPS = re.compile(r"(?:^|\.)param_groups\.")
_INDEXED = re.compile(r"(\d+)\.([^.]+)")
_MOST_NAMES = 20_000


class Setting:
    """A hyper-parameter that is asked for: of the `index`-th group, or of one parameter."""

    def __init__(self, name: str, index: int | None, parameter: str | None) -> None:
        self.name, self.index, self.parameter = name, index, parameter


class Resolver:
    """Finds what a key means, whatever it is nested in: model and optimizer are known by the names in them."""

    def __init__(self, view: UniversalView, model: str | None = None) -> None:
        """`model` is what the model is called in the state dict, where that is none of `MODEL_KEYS`."""
        self.view = view
        self.model_keys = MODEL_KEYS if model is None else (*MODEL_KEYS, model)
        rest = {key: value for key, value in view.state.items() if key != "param_groups"}
        self.values = {".".join(map(str, path)): value for path, value in flatten(rest)}
        self.groups: list[dict[str, Any]] = view.state.get("param_groups", [])
        self._group_of = {name: group for group in self.groups for name in group.get("params", [])}

    def tensor(self, key: str) -> str | None:
        """The name of the tensor in the view; None when it is none."""
        key = plain(key)
        whole = self._stored(key)
        if whole is not None:
            return whole
        for match in _STATE.finditer(key):
            found = self._state(key[match.end() :])
            if found is not None:
                return found
        parts = key.split(".")
        for count in range(1, len(parts)):
            if self._holds_model(parts[:count]):
                found = self._stored(".".join(parts[count:]))
                if found is not None:
                    return found
        return None

    def _holds_model(self, parts: list[str]) -> bool:
        """Whether a model is below these keys: `model`, `app.model`, `model.0` (of several parts)."""
        return parts[-1] in self.model_keys or (len(parts) > 1 and parts[-1].isdigit() and parts[-2] in self.model_keys)

    def _stored(self, name: str) -> str | None:
        name = self.view.aliases.get(name, name)
        return name if name in self.view.tensors else None

    def _state(self, rest: str) -> str | None:
        """`<parameter>.<state>`, of whichever of its names the parameter has."""
        found = self.view.tensors.get(rest)
        if found is not None and found.state is not None:
            return rest
        for at in (at for at, letter in enumerate(rest) if letter == "."):
            owner = self.view.aliases.get(rest[:at])
            if owner is not None and (name := tensor_name(owner, rest[at + 1 :])) in self.view.tensors:
                return name
        return None

    def setting(self, key: str) -> Setting | None:
        """The hyper-parameter that the key means."""
        match = _GROUPS.search(key)
        if match is None or not self.groups:
            return None
        rest = plain(key[match.end() :])
        indexed = _INDEXED.fullmatch(rest)
        if indexed is not None:
            return Setting(indexed[2], int(indexed[1][:9]), None)
        parameter, _, name = rest.rpartition(".")
        return Setting(name, None, parameter) if self._group(parameter) is not None else None

    def _group(self, parameter: str) -> dict[str, Any] | None:
        return self._group_of.get(parameter) or self._group_of.get(self.view.aliases.get(parameter, parameter))

    def value_of(self, setting: Setting, parameters: list[str] | None, current: Any) -> Any:
        """The setting of the parameters (of the group with the same number where they are not known).

        `current` is what the optimizer has now. Raises `CheckpointError` where the checkpoint has no one value.
        """
        if setting.name == "params":
            return self._indexed(setting)["params"] if parameters is None else parameters
        if setting.parameter is not None:
            groups = [self._group_of.get(setting.parameter) or self._group(setting.parameter)]
        elif parameters is None:
            groups = [self._indexed(setting)]
        else:
            groups = [self._group(plain(one)) for one in parameters]
        known = [group for group in groups if group is not None and setting.name in group]
        if not known:
            if setting.name in DECISIVE and parameters != []:
                raise CheckpointError(
                    f"the checkpoint at {self.view.files.location} has no {setting.name} for "
                    f"{(parameters or ['its groups'])[0]}: leave param_groups out of what is loaded"
                )
            return current
        if any(group[setting.name] != known[0][setting.name] for group in known):
            raise CheckpointError(
                f"parameters that share group {setting.index} now had several values of {setting.name} in the "
                f"checkpoint at {self.view.files.location}: give the optimizer the groups that it had"
            )
        return as_torch(setting.name, known[0][setting.name])

    def _indexed(self, setting: Setting) -> dict[str, Any]:
        if setting.index is None or setting.index >= len(self.groups):
            raise CheckpointError(
                f"the checkpoint at {self.view.files.location} has {len(self.groups)} parameter groups but group "
                f"{setting.index} is asked for: give the optimizer the groups that it had"
            )
        return self.groups[setting.index]

    def missing(self, key: str) -> CheckpointError:
        """The error for a key that means nothing here."""
        where = f"the checkpoint at {self.view.files.location} (step {self.view.step}, {self.view.source})"
        if re.search(r"(?:^|\.)state\.\d+\.[^.]+$", key):
            return CheckpointError(
                f"{where} knows parameters by name but {key} numbers them: load into "
                "get_optimizer_state_dict(model, optimizer) instead of optimizer.state_dict()"
            )
        names = [*self.view.tensors, *self.view.aliases, *self.values][:_MOST_NAMES]
        near = difflib.get_close_matches(plain(key), names, 3, 0.5)
        advice = f"the nearest names are {', '.join(near)}" if near else "no name in it is near that"
        return CheckpointError(
            f"{where} has no {key}: {advice}; pass model= if the model is called otherwise in the state dict, or "
            "allow_partial_load=True to leave alone what it lacks"
        )

    def canonical(self) -> Iterator[tuple[str, KeyPath]]:
        """Every key under which this resolver offers something by itself, and where it lies in a nested state dict."""
        for path, _ in (*tensors(self.view), *values(self.view)):
            yield ".".join(map(str, path)), path
