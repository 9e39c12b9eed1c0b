"""DeepSpeed's files, written after their published layout and without DeepSpeed: for cases that no run makes quickly.

Everything that is padding holds NaN, so that a reader that takes an element too many is found out.
"""

from __future__ import annotations

import enum
import math
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

Tensors = dict[str, torch.Tensor]


class ZeroStageEnum(int, enum.Enum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


@dataclass
class fragment_address:
    numel: int
    start: int


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 128.0
        self.dynamic = False


_CLASSES = {
    "deepspeed.runtime.zero.config": ZeroStageEnum,
    "deepspeed.utils.tensor_fragment": fragment_address,
    "deepspeed.runtime.fp16.loss_scaler": LossScaler,
}


@contextmanager
def deepspeed_names() -> Iterator[None]:
    """The classes above are pickled as DeepSpeed's."""
    modules: dict[str, Any] = {"deepspeed": types.ModuleType("deepspeed")}
    for name, kind in _CLASSES.items():
        modules[name] = types.ModuleType(name)
        setattr(modules[name], kind.__name__, kind)
    before = {kind: kind.__module__ for kind in _CLASSES.values()}
    with patch.dict(sys.modules, modules):
        try:
            for name, kind in _CLASSES.items():
                kind.__module__ = name
            yield
        finally:
            for kind, name in before.items():
                kind.__module__ = name


@dataclass
class Model:
    """What is saved: parameter groups of masters by name, states of each parameter, and what is not trained."""

    groups: list[Tensors]
    states: dict[str, Tensors] = field(default_factory=dict)
    """State -> parameter -> tensor."""
    dtype: torch.dtype = torch.float32
    frozen: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    step: Any = field(default_factory=lambda: torch.tensor(3.0))
    hyper: list[dict[str, Any]] = field(default_factory=list)
    client: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] | None = None

    @property
    def masters(self) -> Tensors:
        return {name: tensor for group in self.groups for name, tensor in group.items()}

    def hypers(self) -> list[dict[str, Any]]:
        return self.hyper or [{"lr": 0.1 / (1 + index), "betas": (0.9, 0.95)} for index in range(len(self.groups))]

    def expected(self) -> Tensors:
        """The universal view of it."""
        found = dict(self.masters) | self.frozen | self.buffers
        for state, tensors in self.states.items():
            found |= {f"{name}.{state}": tensor for name, tensor in tensors.items()}
        if self.step is not None:
            found |= {f"{name}.step": torch.tensor(float(self.step)) for name in self.masters}
        return found


def model(
    groups: list[list[tuple[str, tuple[int, ...]]]],
    states: tuple[str, ...] = ("exp_avg", "exp_avg_sq"),
    seed: int = 0,
    **more: Any,
) -> Model:
    """A model of these shapes whose every element is another number."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    made = [{name: tensor(shape) for name, shape in group} for group in groups]
    names = {name: tensor.shape for group in made for name, tensor in group.items()}
    return Model(
        made, {state: {name: tensor(tuple(shape)) for name, shape in names.items()} for state in states}, **more
    )


@dataclass(frozen=True)
class Layout:
    """How ZeRO lays it out."""

    stage: int = 1
    world: int = 2
    style: str = "zero"
    """zero, bf16 (BF16_Optimizer), elastic, or old (neither paddings nor mappings)."""
    round_robin: bool = False
    alignment: int = 1
    """Elements that a parameter's offset in the flat vector is a multiple of."""
    sub_group: int = 10**9
    """Elements on a rank from which on ZeRO 3 starts a new sub-group."""
    mp: int = 0


def save(root: Path, made: Model, layout: Layout, tag: str = "step3") -> Path:
    """Write the checkpoint and `latest`; returns the tag's folder."""
    folder = root / tag
    folder.mkdir(parents=True, exist_ok=True)
    (root / "latest").write_text(tag)
    with deepspeed_names():
        for name, content in contents(made, layout).items():
            torch.save(content, folder / name)
    return folder


def contents(made: Model, layout: Layout) -> dict[str, Any]:
    """File name -> what torch.save writes."""
    return _zero3(made, layout) if layout.stage == 3 else _zero12(made, layout)


def optimizer_name(layout: Layout, made: Model, rank: int) -> str:
    prefix = "bf16_" if made.dtype == torch.bfloat16 else ""
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_{layout.mp:02d}_optim_states.pt"


def _common(made: Model, layout: Layout) -> dict[str, Any]:
    return {
        "buffer_names": list(made.buffers),
        "optimizer": None,
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": dict(made.aliases),
        "lr_scheduler": {"last_batch_iteration": 3},
        "global_steps": 3,
        "skipped_steps": 0,
        "dp_world_size": layout.world,
        "mp_world_size": 1,
        "ds_config": {"bf16": {"enabled": made.dtype == torch.bfloat16}},
        "ds_version": "0.19.8",
        **({"universal_checkpoint_info": made.info} if made.info is not None else {}),
        **made.client,
    }


# ---------------------------------------------------------------- ZeRO 1 and 2


def _dealt(group: Tensors, layout: Layout) -> list[str]:
    names = list(group)
    if not layout.round_robin:
        return names
    return [name for first in range(layout.world) for name in names[first :: layout.world]]


def _zero12(made: Model, layout: Layout) -> dict[str, Any]:
    orders = [_dealt(group, layout) for group in made.groups]
    flats = [_Flat(made, order, layout) for order in orders]
    module = OrderedDict((name, tensor.to(made.dtype)) for name, tensor in made.masters.items())
    module |= made.frozen | made.buffers
    module |= {alias: module[owner] for alias, owner in made.aliases.items()}
    common = _common(made, layout) | {
        "module": module,
        "param_shapes": [OrderedDict((name, made.masters[name].shape) for name in order) for order in orders],
    }
    if layout.stage == 2:
        common["frozen_param_shapes"] = {name: tensor.shape for name, tensor in made.frozen.items()}
        common["frozen_param_fragments"] = dict(made.frozen)
    files = {f"mp_rank_{layout.mp:02d}_model_states.pt": common}
    for rank in range(layout.world):
        state = _optimizer12(made, layout, flats, rank)
        files[optimizer_name(layout, made, rank)] = {"optimizer_state_dict": state, "ds_version": "0.19.8"}
    return files


class _Flat:
    """One group flattened: offsets of its parameters, and the vectors of the master and the states."""

    def __init__(self, made: Model, order: list[str], layout: Layout) -> None:
        self.offsets: dict[str, int] = {}
        self.paddings = []
        at = 0
        for index, name in enumerate(order):
            self.offsets[name] = at
            at += made.masters[name].numel()
            gap = 0 if index == len(order) - 1 else -at % layout.alignment
            self.paddings.append(gap)
            at += gap
        self.used = at
        self.share = math.ceil(at / (2 * layout.world)) * 2
        self.order = order
        self.numel = {name: made.masters[name].numel() for name in order}
        self.vectors = {None: self._flat(made.masters, layout)}
        self.vectors |= {state: self._flat(tensors, layout) for state, tensors in made.states.items()}

    def _flat(self, tensors: Tensors, layout: Layout) -> torch.Tensor:
        flat = torch.full((self.share * layout.world,), math.nan)
        for name, at in self.offsets.items():
            flat[at : at + self.numel[name]] = tensors[name].flatten()
        return flat

    def part(self, state: str | None, rank: int, padded: bool) -> torch.Tensor:
        end = (rank + 1) * self.share
        end = end if padded else max(rank * self.share, min(end, self.used))
        return self.vectors[state][rank * self.share : end].clone()

    def padding(self, rank: int) -> int:
        return self.share - self.part(None, rank, padded=False).numel()

    def mapping(self, rank: int) -> OrderedDict[str, fragment_address]:
        found = OrderedDict()
        for name, at in self.offsets.items():
            start, end = max(at, rank * self.share), min(at + self.numel[name], (rank + 1) * self.share)
            if start < end:
                found[name] = fragment_address(numel=end - start, start=start - rank * self.share)
        return found


def _optimizer12(made: Model, layout: Layout, flats: list[_Flat], rank: int) -> dict[str, Any]:
    bf16, elastic = layout.style == "bf16", layout.style == "elastic"
    states = [
        {"step": made.step} | {state: flat.part(state, rank, padded=not elastic) for state in made.states}
        for flat in flats
    ]
    groups = [hyper | {"params": [index]} for index, hyper in enumerate(made.hypers())]
    found: dict[str, Any] = {
        "clip_grad": 1.0,
        "base_optimizer_state": states if elastic else {"state": dict(enumerate(states)), "param_groups": groups},
        "single_partition_of_fp32_groups": [flat.part(None, rank, padded=bf16) for flat in flats],
        "partition_count": [layout.world] * len(flats),
    }
    last = rank == layout.world - 1
    if layout.style != "old":
        whole = [flat.share * layout.world - flat.used for flat in flats]
        own = [flat.padding(rank) for flat in flats]
        found["group_paddings"] = [size if last else 0 for size in whole] if bf16 else own
        found["param_slice_mappings"] = [flat.mapping(rank) for flat in flats]
    if layout.alignment > 1:
        found["param_alignment_paddings"] = [flat.paddings for flat in flats]
    if not bf16:
        found |= {"loss_scaler": LossScaler(), "dynamic_loss_scale": False, "overflow": False}
        found["zero_stage"] = ZeroStageEnum(layout.stage)
    return found


# ---------------------------------------------------------------- ZeRO 3


def _sub_groups(made: Model, layout: Layout) -> tuple[list[list[str]], list[list[int]]]:
    """Sub-groups of names, and the sub-groups of each parameter group."""
    found: list[list[str]] = []
    owners = []
    for group in made.groups:
        first, size = len(found), layout.sub_group
        for name, tensor in group.items():
            if size >= layout.sub_group:
                found.append([])
                size = 0
            found[-1].append(name)
            size += math.ceil(tensor.numel() / layout.world)
        owners.append(list(range(first, len(found))))
    return found, owners


def _part(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    size = math.ceil(tensor.numel() / world)
    padded = torch.full((size * world,), math.nan, dtype=tensor.dtype)
    padded[: tensor.numel()] = tensor.flatten()
    return padded[rank * size : (rank + 1) * size].clone()


def _zero3(made: Model, layout: Layout) -> dict[str, Any]:
    groups, owners = _sub_groups(made, layout)
    module: dict[str, Any] = {name: torch.empty(0, dtype=made.dtype) for name in (*made.masters, *made.frozen)}
    module |= made.buffers | {alias: torch.empty(0, dtype=made.dtype) for alias in made.aliases}
    files = {}
    for rank in range(layout.world):
        shapes = [OrderedDict((name, made.masters[name].shape) for name in names) for names in groups]
        common = _common(made, layout) | {"module": OrderedDict(module), "param_shapes": shapes}
        common["frozen_param_shapes"] = {name: tensor.shape for name, tensor in made.frozen.items()}
        common["frozen_param_fragments"] = {
            name: _part(tensor, rank, layout.world) for name, tensor in made.frozen.items()
        }
        if rank:
            common["shared_params"] = {}
        files[f"zero_pp_rank_{rank}_mp_rank_{layout.mp:02d}_model_states.pt"] = common

        def flat(tensors: Tensors, names: list[str], rank: int = rank) -> torch.Tensor:
            return torch.cat([_part(tensors[name], rank, layout.world) for name in names])

        states = {
            index: {"step": made.step} | {state: flat(tensors, names) for state, tensors in made.states.items()}
            for index, names in enumerate(groups)
        }
        hyper = [hyper | {"params": ids} for hyper, ids in zip(made.hypers(), owners, strict=True)]
        files[optimizer_name(layout, made, rank)] = {
            "optimizer_state_dict": {
                "zero_stage": ZeroStageEnum(3),
                "loss_scaler": LossScaler(),
                "dynamic_loss_scale": False,
                "overflow": False,
                "partition_count": layout.world,
                "optimizer_state_dict": {"state": states, "param_groups": hyper},
                "fp32_flat_groups": [_marked(flat(made.masters, names)) for names in groups],
            }
        }
    return files


def _marked(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with an attribute of its own, which is pickled in another way."""
    tensor.ds_id = 7  # type: ignore[attr-defined]
    return tensor
