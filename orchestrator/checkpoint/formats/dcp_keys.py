"""Which keys of a state dict are the model's and which an optimizer's, whatever they are nested in. Pure.

An optimizer is recognised by its own keys, `<root>state.<parameter>.<state>` and `<root>param_groups...`, in the two
forms that torch's `get_optimizer_state_dict` gives them (nested and flattened) and in that of `Optimizer.state_dict`;
the model by the keys that end in the optimizer's parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KeyPath = tuple[str | int, ...]
"""Keys and positions that lead to a value in a nested state dict."""

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""What `torch.compile`, activation checkpointing and FSDP put into the names of a module's parameters."""
MODEL_KEYS = ("model", "module", "state_dict", "model_state_dict")
"""What models are called in state dicts that hold more than a model."""
MAX_OPTIMIZERS = 64
"""Further ones are read as tensors of their own."""
_GROUPS = re.compile(r"(?:^|(?<=\.))param_groups(?:\.|$)")
_INDEXED = re.compile(r"(\d+)\.([^.]+)")
_STATES = (".exp_avg", ".exp_avg_sq", ".max_exp_avg_sq", ".momentum_buffer", ".square_avg")


@dataclass(slots=True)
class Optimizer:
    """The keys of one optimizer."""

    root: str
    """What its keys begin with: empty, or ending in a dot."""
    states: dict[str, dict[str, str]] = field(default_factory=dict)
    """Parameter (or its number) -> state -> key."""
    indexed: dict[int, dict[str, str]] = field(default_factory=dict)
    """Group -> hyper-parameter -> key."""
    flattened: dict[str, dict[str, str]] = field(default_factory=dict)
    """Parameter -> hyper-parameter -> key, where every parameter has its own copy."""
    whole: str | None = None
    """The key of the list of all groups, where it is one entry."""

    def used(self) -> Iterator[str]:
        """All its keys."""
        for members in self.states.values():
            yield from members.values()
        yield from self.settings()

    def settings(self) -> Iterator[str]:
        """The keys of its groups."""
        for members in (*self.indexed.values(), *self.flattened.values()):
            yield from members.values()
        if self.whole is not None:
            yield self.whole


def find_optimizers(keys: Collection[str], paths: Mapping[str, KeyPath]) -> list[Optimizer]:
    """The optimizers whose keys are among `keys`, in the order of those."""
    roots = list(dict.fromkeys(key[: match.start()] for key in keys if (match := _GROUPS.search(key))))
    claimed = tuple(root + "state." for root in roots[:MAX_OPTIMIZERS])
    for key in keys:
        root = _root_of_state(key)
        if root is not None and not key.startswith(claimed) and len(claimed) < MAX_OPTIMIZERS:
            roots.append(root)
            claimed = (*claimed, root + "state.")
    return [_optimizer(root, keys, paths) for root in roots[:MAX_OPTIMIZERS]]


def _root_of_state(key: str) -> str | None:
    """What the keys of an optimizer without groups begin with, if this is one of its states by its name."""
    if not key.endswith(_STATES):
        return None
    at = f".{key}".rfind(".state.")
    return None if at < 0 else key[:at]


def _optimizer(root: str, keys: Iterable[str], paths: Mapping[str, KeyPath]) -> Optimizer:
    found = Optimizer(root)
    states = []
    for key in keys:
        if key.startswith(root + "param_groups"):
            _add_group(found, key, paths.get(key))
        elif key.startswith(root + "state."):
            states.append(key)
    for key in states:
        parameter, state = _split_state(key, root + "state", paths.get(key), found.flattened)
        found.states.setdefault(parameter, {})[state] = key
    return found


def _add_group(optimizer: Optimizer, key: str, path: KeyPath | None) -> None:
    rest = key[len(optimizer.root) + len("param_groups") :]
    if not rest:
        optimizer.whole = key
        return
    rest = rest[1:]
    below = _below(path, optimizer.root + "param_groups")
    match = _INDEXED.fullmatch(rest)
    if match and (below is None or type(below[0]) is int):
        optimizer.indexed.setdefault(int(match[1][:9]), {})[match[2]] = key
    else:
        parameter, _, name = rest.rpartition(".")
        optimizer.flattened.setdefault(parameter, {})[name] = key


def _split_state(key: str, section: str, path: KeyPath | None, known: Collection[str]) -> tuple[str, str]:
    """The parameter and the state that a key means."""
    below = _below(path, section)
    if below is not None and len(below) > 1:
        return str(below[0]), ".".join(map(str, below[1:]))
    rest = key[len(section) + 1 :]
    for end in reversed([at for at, letter in enumerate(rest) if letter == "."]):
        if rest[:end] in known:
            return rest[:end], rest[end + 1 :]
    parameter, _, state = rest.rpartition(".")
    return parameter, state


def _below(path: KeyPath | None, section: str) -> KeyPath | None:
    """The rest of a path below `section`; None where the path does not pass through exactly that."""
    if path is None:
        return None
    for count in range(1, len(path)):
        if ".".join(map(str, path[:count])) == section:
            return path[count:]
    return None


def plain(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def model_prefixes(
    parameters: Sequence[str],
    keys: Collection[str],
    root: str,
    fits: Callable[[str, str], bool] = lambda name, key: True,
) -> list[str]:
    """What the model's keys begin with, of an optimizer of these parameters; empty when no key is one of them.

    `fits` says whether a parameter can be what a key holds. Of several (a model and its average, say) it is the one
    called a model, else the one nearest to the optimizer; where that settles nothing, all of them, the shortest first.
    """
    names = {plain(name): name for name in parameters}
    by_name = {plain(key): key for key in keys}
    counts: dict[str, int] = {}
    for name in dict.fromkeys((*list(names)[:1], *list(names)[-1:])):
        for key in by_name:
            if key == name or key.endswith("." + name):
                counts.setdefault(key[: len(key) - len(name)], 0)
    for prefix in counts:
        found = ((given, by_name.get(prefix + name)) for name, given in names.items())
        counts[prefix] = sum(key is not None and fits(given, key) for given, key in found)
    if not counts or not max(counts.values()):
        return []
    best = sorted(
        (prefix for prefix in counts if counts[prefix] == max(counts.values())),
        key=lambda prefix: (_strangeness(prefix, root), len(prefix), prefix),
    )
    return [prefix for prefix in best if _strangeness(prefix, root) == _strangeness(best[0], root)]


def model_prefix(parameters: Sequence[str], keys: Collection[str], root: str) -> str | None:
    """The first of `model_prefixes`."""
    return next(iter(model_prefixes(parameters, keys, root)), None)


def _strangeness(prefix: str, root: str) -> tuple[bool, int]:
    last = prefix.rstrip(".").rpartition(".")[2]
    shared = sum(1 for _ in _common(prefix.split("."), root.split(".")))
    return last not in ("", *MODEL_KEYS), -shared


def _common(one: Sequence[Any], other: Sequence[Any]) -> Iterator[Any]:
    for first, second in zip(one, other, strict=False):
        if first != second:
            return
        yield first


def lone_model_prefix(keys: Collection[str], paths: Mapping[str, KeyPath]) -> str:
    """What the keys of a model without an optimizer begin with, by what they were nested in."""
    holders: dict[KeyPath, int] = {}
    for key in keys:
        path = paths.get(key)
        if path is not None:
            holders[path[:-1]] = holders.get(path[:-1], 0) + 1
    if not holders:
        return ""
    named = [holder for holder in holders if holder and holder[-1] in MODEL_KEYS]
    only = named if len(named) == 1 else list(holders)
    if len(only) != 1:
        return ""
    return "".join(f"{part}." for part in only[0])


class Names:
    """Universal names of the tensors that are no optimizer's, and of an optimizer's parameters."""

    def __init__(self, keys: Sequence[str], prefixes: Iterable[str | None], lone: str) -> None:
        """`prefixes` of the optimizers' models; `lone` is the model's where no optimizer has one."""
        self.models = tuple(prefix for prefix in dict.fromkeys(prefixes) if prefix is not None) or (lone,)
        """What the keys of the models begin with."""
        self.by_key = {key: self._name(key) for key in keys}
        """Without the model's prefix, if there is one model."""
        self.repeated = len(self.by_key) - len(set(self.by_key.values()))
        """Names that were given twice: all keep their keys then."""
        if self.repeated:
            self.by_key = {key: key for key in keys}
        self._unwrapped = {plain(key): name for key, name in self.by_key.items()}

    def _name(self, key: str) -> str:
        prefix = self.models[0] if len(self.models) == 1 else ""
        return plain(key.removeprefix(prefix))

    def parameter(self, name: str, prefix: str | None) -> str:
        """The universal name of a parameter of an optimizer whose model has this prefix."""
        known = self.by_key.get((prefix or "") + name) or self._unwrapped.get(plain((prefix or "") + name))
        return known or plain(name if len(self.models) == 1 else (prefix or "") + name)


def is_statistic(key: str, keys: Collection[str]) -> bool:
    """Whether it is a running statistic of batch normalisation: beside it lies the count of batches."""
    module, dot, name = key.rpartition(".")
    return name in ("running_mean", "running_var") and f"{module}{dot}num_batches_tracked" in keys


def embed(wanted: Sequence[tuple[int, ...] | None], offered: Sequence[tuple[int, ...]]) -> list[int] | None:
    """Where `wanted` shapes lie within the `offered` ones, in order, if there is exactly one way; None = any shape."""
    left = _leftmost(wanted, offered)
    right = _leftmost(wanted[::-1], offered[::-1])
    if left is None or right is None:
        return None
    mirrored = [len(offered) - 1 - at for at in reversed(right)]
    return left if left == mirrored else None


def _leftmost(wanted: Sequence[tuple[int, ...] | None], offered: Sequence[tuple[int, ...]]) -> list[int] | None:
    found: list[int] = []
    at = 0
    for shape in wanted:
        while at < len(offered) and shape is not None and offered[at] != shape:
            at += 1
        if at >= len(offered):
            return None
        found.append(at)
        at += 1
    return found
