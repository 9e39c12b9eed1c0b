"""What a DeepSpeed checkpoint holds beside tensors: parameter groups, scheduler, loss scaler, the client's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.deepspeed_module import listed
from orchestrator.checkpoint.formats.pickled_values import Node, Plain
from orchestrator.core.errors import CorruptCheckpoint

_LAYOUT = frozenset(
    {
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "frozen_param_fragments",
        "shared_params",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_config",
        "ds_version",
        "ds_autoep_layers",
        "autoep_layers",
        "num_experts",
    }
)
"""Keys of a model file that say how it is laid out; all others are state."""
_OPTIMIZER = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
"""Keys of an optimizer file that are state."""
_FP16 = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
"""Keys of the loss scaler where the optimizer is not partitioned."""


def plain_state(files: Files, model: Node, optimizer: Node | None, notes: list[str]) -> dict[str, Any]:
    """JSON-able state of the first rank's files, keys as they name them; what has no such form is noted."""
    plain = Plain(files)
    state: dict[str, Any] = {}
    for key, node in () if optimizer is None else optimizer_items(optimizer):
        _put(plain, state, key, node)
    for key in model.mapping():
        node = model.at(key)
        if isinstance(key, str) and key not in _LAYOUT and node.value is not None:
            _put(plain, state, key, node)
    if plain.dropped:
        notes.append(f"What is not plain data is left out of the state: {listed(plain.dropped)}.")
    return state


def optimizer_items(optimizer: Node) -> list[tuple[str, Node]]:
    """The optimizer's own state, as far as it is there."""
    found = [(key, optimizer.find(key)) for key in (*_OPTIMIZER, *_FP16)]
    return [(key, node) for key, node in found if node is not None]


def _put(plain: Plain, state: dict[str, Any], key: str, node: Node) -> None:
    before = len(plain.dropped)
    value = plain.of(node)
    if value is not None or len(plain.dropped) == before:
        state[key] = value


def step_of_model(model: Node) -> int:
    """Training steps taken, as the engine counts them; 0 where the file does not say."""
    for key in ("global_steps", "iteration"):
        node = model.find(key)
        if node is not None:
            try:
                return node.count()
            except CorruptCheckpoint:
                if key == "global_steps":
                    raise
    return 0


def hyper_parameters(files: Files, groups: Node, notes: list[str]) -> list[dict[str, Any]]:
    """The hyper-parameters of each of the optimizer's parameter groups, without their parameters."""
    plain = Plain(files)
    found = []
    for group in groups.items():
        group.mapping()
        members = {key: value for key, value in group.value.items() if key not in ("params", "param_names")}
        found.append(plain.of(Node(members, group.label, group.path)))
    if plain.dropped:
        notes.append(f"What is not plain data is left out of the parameter groups: {listed(plain.dropped)}.")
    return found


def merge_groups(ranks: Sequence[Sequence[tuple[dict[str, Any], Sequence[str]]]]) -> list[dict[str, Any]]:
    """The parameter groups of the whole model from those of each model-parallel rank.

    A pipeline stage without a parameter of some group does not have the group, so that groups are the same where
    their hyper-parameters are, at the same position if possible.
    """
    merged: list[tuple[dict[str, Any], dict[str, None]]] = []
    for rank in ranks:
        free = set(range(len(merged)))
        for index, (hyper, names) in enumerate(rank):
            same = [at for at in sorted(free, key=lambda at: (at != index, at)) if merged[at][0] == hyper]
            if same:
                free.discard(same[0])
                merged[same[0]][1].update(dict.fromkeys(names))
            else:
                merged.append((hyper, dict.fromkeys(names)))
    return [{**hyper, "params": list(names)} for hyper, names in merged]


def config_dtype(model: Node) -> str | None:
    """The dtype of training that DeepSpeed's configuration asked for."""
    config = model.find("ds_config")
    for key, dtype in (("bf16", "BF16"), ("bfloat16", "BF16"), ("fp16", "F16")):
        section = None if config is None else config.find(key)
        if section is not None and isinstance(section.value, dict) and section.value.get("enabled") is True:
            return dtype
    return None
