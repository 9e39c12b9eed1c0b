"""The live state of an engine, gathered in memory and never from its checkpoint files.

ZeRO-1, ZeRO-2 and BF16_Optimizer: a trainable parameter's storage is a view into its group's flat buffer, so where it
lies in that buffer is its address less the buffer's; fp32 master and optimizer states are gathered flat and cut at the
same place. That holds for padding, alignment and round-robin order alike, and asks nothing of the mapping that
DeepSpeed writes (whose `safe_get_full_optimizer_state` fails for all groups but the first). ZeRO-3: DeepSpeed's own
`safe_get_full_*`. No ZeRO: the optimizer's own state. In every case the master rounded to the training type must be the
weight.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

Live = dict[str, torch.Tensor]


class Snapshot:
    """Tensors under `weight/`, `master/`, `state/<kind>/`, `buffer/`, `frozen/` and a name; scalars: kind -> name."""

    def __init__(self) -> None:
        self.tensors: Live = {}
        self.scalars: dict[str, dict[str, float]] = {}

    def put(self, prefix: str, name: str, tensor: torch.Tensor) -> None:
        self.tensors[f"{prefix}/{name}"] = tensor.detach().clone().contiguous()

    def states(self, name: str, found: dict[str, Any]) -> None:
        """Keep what is a number; what is a tensor is gathered by the caller."""
        for kind, value in found.items():
            if isinstance(value, int | float) or (torch.is_tensor(value) and value.ndim == 0):
                self.scalars.setdefault(kind, {})[name] = float(value)


def snapshot(engine: Any) -> Snapshot:
    """Every rank calls this; every rank gets its data-parallel group's whole state."""
    found = Snapshot()
    trainable: dict[str, nn.Parameter] = {}
    for name, parameter in engine.module.named_parameters():
        prefix = "weight" if parameter.requires_grad else "frozen"
        if parameter.requires_grad:
            trainable[name] = parameter
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                found.put(prefix, name, parameter.data)
        else:
            found.put(prefix, name, parameter.data)
    for name, buffer in engine.module.named_buffers():
        owner, _, last = name.rpartition(".")
        if last not in engine.module.get_submodule(owner)._non_persistent_buffers_set:
            found.put("buffer", name, buffer)
    _gather(engine, trainable, found)
    for name in trainable:
        weight, master = found.tensors[f"weight/{name}"], found.tensors[f"master/{name}"]
        if not torch.equal(master.to(weight.dtype), weight):
            raise AssertionError(f"{name}: the master weight does not round to the training weight")
    return found


def _gather(engine: Any, trainable: dict[str, nn.Parameter], found: Snapshot) -> None:
    outer = engine.optimizer
    if hasattr(outer, "fp32_partitioned_groups_flat"):
        _zero3(outer, trainable, found)
    elif hasattr(outer, "bit16_groups_flat"):
        _flat(outer, outer.bit16_groups_flat, outer.single_partition_of_fp32_groups, trainable, found)
    elif hasattr(outer, "bf16_groups_flat"):
        _flat(outer, outer.bf16_groups_flat, outer.fp32_groups_flat_partition, trainable, found)
    elif hasattr(outer, "fp32_groups"):
        masters = [master for group in outer.fp32_groups for master in group]
        weights = [weight for group in outer.fp16_groups for weight in group]
        pairs = {id(weight): master for weight, master in zip(weights, masters, strict=True)}
        _unsharded(outer.optimizer.state, {name: pairs[id(p)] for name, p in trainable.items()}, found)
    else:
        _unsharded(outer.state, trainable, found)


def _unsharded(state: Any, masters: dict[str, Any], found: Snapshot) -> None:
    for name, master in masters.items():
        found.put("master", name, master.data)
        found.states(name, state.get(master, {}))
        for kind, value in state.get(master, {}).items():
            if torch.is_tensor(value) and value.shape == master.shape and not (value.ndim == 0 and kind == "step"):
                found.put(f"state/{kind}", name, value)
                found.scalars.get(kind, {}).pop(name, None)


def _flat(outer: Any, weights: Any, masters: Any, trainable: dict[str, nn.Parameter], found: Snapshot) -> None:
    left = dict(trainable)
    for index, (flat, master) in enumerate(zip(weights, masters, strict=True)):
        group = outer.real_dp_process_group[index]
        state = outer.optimizer.state.get(master, {})
        parts = {"master": master.data}
        parts |= {f"state/{k}": v for k, v in state.items() if torch.is_tensor(v) and v.shape == master.shape}
        whole = {kind: _all_gathered(part, group) for kind, part in parts.items()}
        for name, parameter in list(left.items()):
            offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            if parameter.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
                continue
            del left[name]
            for kind, tensor in whole.items():
                found.put(kind, name, tensor[offset : offset + parameter.numel()].reshape(parameter.shape))
            found.states(name, state)
    if left:
        raise AssertionError(f"in no flat buffer: {sorted(left)}")


def _all_gathered(part: torch.Tensor, group: Any) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group=group))]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def _zero3(outer: Any, trainable: dict[str, nn.Parameter], found: Snapshot) -> None:
    for name, parameter in trainable.items():
        found.put("master", name, safe_get_full_fp32_param(parameter).reshape(parameter.ds_shape))
        flat = outer.fp32_partitioned_groups_flat[outer.grad_position[outer.get_param_id(parameter)][0]]
        state = outer.optimizer.state.get(flat, {})
        found.states(name, state)
        for kind, value in state.items():
            if torch.is_tensor(value) and value.shape == flat.shape and value.ndim:
                whole = safe_get_full_optimizer_state(parameter, kind)
                found.put(f"state/{kind}", name, whole.reshape(parameter.ds_shape))
