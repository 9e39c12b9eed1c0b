"""Native checkpoints as the target of `torch.distributed.checkpoint.save`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from orchestrator.checkpoint.archive import TORCH_DTYPES
from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.formats.dcp_keys import (
    KeyPath,
    Names,
    Optimizer,
    find_optimizers,
    is_statistic,
    lone_model_prefix,
    model_prefix,
)
from orchestrator.checkpoint.formats.dcp_values import jsonable, with_lists
from orchestrator.checkpoint.formats.native import write_part
from orchestrator.checkpoint.layout import Box, Piece
from orchestrator.checkpoint.manifest import PartEntry, directory_name, part_name
from orchestrator.checkpoint.parts import load_part
from orchestrator.checkpoint.root import create_root
from orchestrator.checkpoint.store import commit, newest_generation
from orchestrator.core.errors import CheckpointError
from orchestrator.core.types import SaveReport

Role = tuple[str, str | None, str]
"""(parameter, state, kind) of a tensor."""


@dataclass(frozen=True, slots=True)
class _Order:
    """What the coordinator tells a rank."""

    rank: int
    world_size: int
    generation: int
    roles: Mapping[str, Role]
    prefixes: Mapping[str, str | None]
    """Optimizer's root -> what its model's keys begin with."""
    lone: str
    """What the model's keys begin with, where no optimizer tells."""


class NativeWriter(StorageWriter):
    """Saves a state dict as a committed native checkpoint of `step` under `root`.

        dcp.save({"model": model_state, "optim": optimizer_state}, storage_writer=NativeWriter("/ckpt", step=1000))

    Each rank writes its own chunks and rank 0 commits them: until then the checkpoint does not exist for readers.
    Keys become the universal names that `dcp` gives them when it reads such a state dict; `open_checkpoint` and
    `UniversalReader` read the result on any mesh. `generation` fences off older writers (see `store.fence`); by default
    it is the newest known under the root. Values that are not tensors must be JSON-able.
    """

    def __init__(self, root: str | Path, *, step: int, generation: int | None = None) -> None:
        super().__init__()
        self._root = root
        self._step = step
        self._generation = generation

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Save under another root, if one is given."""
        if checkpoint_id is not None:
            self._root = os.fspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises `CheckpointError` for a save without collectives, which nobody could commit."""
        if not kwargs.get("use_collectives", True):
            raise CheckpointError("a native checkpoint is committed by rank 0: save with use_collectives=True")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Each plan with its rank's order; raises `CheckpointError` where it is not certain what a tensor is."""
        base = create_root(self._root)
        generation = max(1, newest_generation(base)) if self._generation is None else self._generation
        naming = _Naming(plans)
        prepared = []
        for rank, plan in enumerate(plans):
            keys = {item.index.fqn for item in plan.items if item.type != WriteItemType.BYTE_IO}
            roles = {key: naming.roles[key] for key in keys}
            order = _Order(rank, len(plans), generation, roles, naming.prefixes, naming.lone)
            prepared.append(dataclasses.replace(plan, storage_data=order))
        return prepared

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part."""
        order: _Order = plan.storage_data
        held = []  # the tensors whose memory the pieces show
        pieces = []
        for item in plan.items:
            if item.type != WriteItemType.BYTE_IO:
                held.append(planner.resolve_data(item).detach().cpu().contiguous())
                pieces.append(_piece(item, order.roles[item.index.fqn], held[-1]))
        report = write_part(
            self._root,
            generation=order.generation,
            step=self._step,
            rank=order.rank,
            world_size=order.world_size,
            pieces=pieces,
            state=_state(planner, order),
            stall_s=0.0,
        )
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(report.part), report.size_bytes, report)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit what all ranks have written."""
        reports: list[SaveReport] = [one.storage_data for written in results for one in written]
        generation = reports[0].generation
        self._require_one_grouping(generation, reports)
        commit(self._root, generation=generation, step=self._step, world_size=len(results), parts=reports)

    def _require_one_grouping(self, generation: int, reports: Sequence[SaveReport]) -> None:
        """Parts are merged group by group, so group n has to be the same on every rank that has one."""
        directory = create_root(self._root) / directory_name(self._step, generation)
        settings: dict[int, dict[str, Any]] = {}
        for report in reports:
            entry = PartEntry(report.rank, report.digest, report.size_bytes)
            part = load_part(
                LocalFiles(directory), entry, step=self._step, generation=generation, world_size=len(reports)
            )
            for index, group in enumerate(part.state.get("param_groups", [])):
                own = {key: value for key, value in group.items() if key != "params"}
                if settings.setdefault(index, own) != own:
                    raise CheckpointError(
                        f"{directory / part_name(report.rank)} has other hyper-parameters in group {index} than an "
                        "earlier rank: save with flatten_optimizer_state_dict=False and the same groups on every rank"
                    )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it could be a root."""
        return isinstance(checkpoint_id, str | os.PathLike)


class _Naming:
    """What the tensors of all plans are."""

    def __init__(self, plans: Sequence[SavePlan]) -> None:
        items = {item.index.fqn: item for plan in plans for item in plan.items}
        paths: dict[str, KeyPath] = {}
        for plan in plans:
            paths.update(plan.planner_data or {})
        tensors = {key: item for key, item in items.items() if item.type != WriteItemType.BYTE_IO}
        optimizers = find_optimizers(items, paths)
        taken = {key for optimizer in optimizers for key in optimizer.used()}
        free = [key for key in tensors if key not in taken]
        self.lone = lone_model_prefix(free, paths)
        self.prefixes = {one.root: _prefix(one, free) for one in optimizers}
        names = Names(free, self.prefixes.values(), self.lone)
        if names.repeated:
            raise CheckpointError(f"{names.repeated} tensors would have the name of another: give the models own keys")
        self.roles: dict[str, Role] = {}
        for key, name in names.by_key.items():
            dtype = tensors[key].tensor_data.properties.dtype
            floating = dtype.is_floating_point and key.startswith(names.models) and not is_statistic(key, tensors)
            self.roles[key] = (name, None, "parameter" if floating else "buffer")
        for optimizer in optimizers:
            for parameter, states in optimizer.states.items():
                owner = names.parameter(parameter, self.prefixes[optimizer.root])
                self.roles.update((key, (owner, state, "state")) for state, key in states.items() if key in tensors)
            for members in (*optimizer.indexed.values(), *optimizer.flattened.values()):
                for setting, key in members.items():
                    if key in tensors:
                        raise CheckpointError(f"the hyper-parameter {setting} ({key}) is a tensor: give it as a number")


def _prefix(optimizer: Optimizer, free: Sequence[str]) -> str | None:
    names = [*optimizer.states, *optimizer.flattened]
    if names and all(name.isdigit() for name in names):
        raise CheckpointError(
            f"{optimizer.root}state numbers its parameters: save get_optimizer_state_dict(model, optimizer) instead of "
            "optimizer.state_dict()"
        )
    return model_prefix(names, free, optimizer.root)


def _piece(item: WriteItem, role: Role, data: torch.Tensor) -> Piece:
    parameter, state, kind = role
    about = item.tensor_data
    dtype = TORCH_DTYPES.get(str(data.dtype).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"{item.index.fqn} has dtype {data.dtype}, which no checkpoint format here holds")
    box = Box(tuple(about.chunk.offsets), tuple(about.chunk.sizes))
    window = memoryview(data.reshape(-1).view(torch.uint8).numpy())
    return Piece(parameter, state, kind, dtype, tuple(about.size), box, window)


def _state(planner: SavePlanner, order: _Order) -> dict[str, Any]:
    """Plain values of this rank: hyper-parameters with the names of its own parameters, and the rest as nested."""
    flat: dict[str, Any] = {
        key: value for key, value in planner.state_dict.items() if not isinstance(value, torch.Tensor)
    }
    paths: Mapping[str, KeyPath] = getattr(planner, "mappings", {})
    optimizers = find_optimizers(planner.state_dict, paths)
    taken = {key for optimizer in optimizers for key in optimizer.settings()}
    names = Names([], order.prefixes.values(), order.lone)
    state: dict[str | int, Any] = {}
    for key, value in flat.items():
        if key in taken:
            continue
        holder = state
        path = paths.get(key, (key,))
        for part in path[:-1]:
            holder = holder.setdefault(part, {})
        holder[path[-1]] = _plain(key, value)
    groups = []
    for optimizer in optimizers:
        prefix = order.prefixes.get(optimizer.root)
        for group in _groups(optimizer, flat):
            listed = [names.parameter(str(name), prefix) for name in group.get("params", [])]
            settings = {key: _plain(key, value) for key, value in group.items() if key not in ("params", "param_names")}
            groups.append({**settings, "params": listed})
    return {str(key): with_lists(value) for key, value in state.items()} | ({"param_groups": groups} if groups else {})


def _groups(optimizer: Optimizer, flat: Mapping[str, Any]) -> list[dict[str, Any]]:
    if optimizer.whole is not None:
        return list(flat[optimizer.whole])
    if optimizer.indexed:
        return [
            {name: flat.get(key) for name, key in members.items()} for _, members in sorted(optimizer.indexed.items())
        ]
    found: dict[str, dict[str, Any]] = {}
    for parameter, members in optimizer.flattened.items():
        settings = {name: flat.get(key) for name, key in members.items()}
        found.setdefault(repr(sorted(settings.items())), {**settings, "params": []})["params"].append(parameter)
    return [group for _, group in sorted(found.items())]  # in the same order on every rank


def _plain(key: str, value: Any) -> Any:
    try:
        return jsonable(value)
    except TypeError as error:
        raise CheckpointError(
            f"{key} is not JSON-able ({error}): save it as numbers, strings, lists and mappings, or as a tensor"
        ) from error
