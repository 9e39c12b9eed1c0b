"""Any checkpoint as the source of `torch.distributed.checkpoint.load`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.formats.dcp_target import torch_dtype
from orchestrator.checkpoint.formats.torch_keys import Resolver, Setting
from orchestrator.checkpoint.language import Rules
from orchestrator.checkpoint.layout import Box, LogicalTensor
from orchestrator.checkpoint.stream import bands
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

STAGED_BYTES = 32 << 20
"""Read at a time on the way to a device or another dtype."""


class UniversalReader(StorageReader):
    """Loads whatever checkpoint lies at `location` into the model's own shards.

        dcp.load({"model": model_state, "optim": optimizer_state}, storage_reader=UniversalReader("/ckpt/step-1000"))

    State dicts are those of `get_model_state_dict`, `get_optimizer_state_dict` (flattened or not) and `get_state_dict`,
    under any key that is called like a model (`model`, `module`, `state_dict`, `model_state_dict`, or what `model`
    says), a bare model's too. Every rank reads the bytes of its own boxes and nothing else; numbers are rounded to the
    dtype of the tensor they are for. Hyper-parameters go by the names of a group's parameters, not by its number.
    A tensor that the checkpoint lacks is an error, or left alone with `allow_partial_load`.
    """

    def __init__(
        self,
        location: str | Path | UniversalView,
        *,
        source: str | None = None,
        tag: str | None = None,
        rules: Rules | None = None,
        model: str | None = None,
        allow_partial_load: bool = False,
    ) -> None:
        """Opens the checkpoint; `source`, `tag` and `rules` as in `open_checkpoint`, which says what is raised."""
        super().__init__()
        self._options: dict[str, Any] = {"source": source, "tag": tag, "rules": rules}
        self._model, self._partial = model, allow_partial_load
        self.view = location if isinstance(location, UniversalView) else open_checkpoint(location, **self._options)
        """What is read."""
        self._resolver = Resolver(self.view, model)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Read another checkpoint, if one is given."""
        if checkpoint_id is not None:
            self.view = open_checkpoint(os.fspath(checkpoint_id), **self._options)
            self._resolver = Resolver(self.view, self._model)

    def read_metadata(self) -> Metadata:
        """What the planner matches the state dict with."""
        offered: Any = _Offered(self._resolver, self._partial)
        return Metadata(offered, planner_data=dict(self._resolver.canonical()), storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is to be done."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors and values of the plan."""
        wanted = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        found = [(item, self._value(item.storage_index.fqn, planner)) for item in wanted]  # before any is replaced
        for item, value in found:
            stream = io.BytesIO()
            torch.save(value, stream)
            stream.seek(0)
            planner.load_bytes(item, stream)
        for item in plan.items:
            if item.type == LoadItemType.TENSOR:
                self._fill(item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it could be a location."""
        return isinstance(checkpoint_id, str | os.PathLike)

    @torch.no_grad()
    def _fill(self, item: ReadItem, planner: LoadPlanner) -> None:
        name = self._resolver.tensor(item.storage_index.fqn)
        assert name is not None, "it was planned"
        tensor = self.view.tensors[name]
        box = Box(tuple(item.storage_offsets), tuple(item.lengths))
        target = planner.resolve_tensor(item).detach()
        _require_kind(tensor, target)
        plain = target.device.type == "cpu" and target.is_contiguous() and target.dtype == torch_dtype(tensor.dtype)
        if plain:
            self.view.read(name, box, _memory(target))
        else:
            for part in bands(box, max(1, STAGED_BYTES // tensor.item_bytes)):
                staged = torch.empty(part.sizes, dtype=torch_dtype(tensor.dtype))
                self.view.read(name, part, _memory(staged))
                target[(*part.relative_to(box.offsets).slices, ...)].copy_(staged)
        planner.commit_tensor(item, target)

    def _value(self, key: str, planner: LoadPlanner) -> Any:
        setting = self._resolver.setting(key)
        if setting is None:
            return self._resolver.values[key]
        path, current = _current(planner, key)
        current = None if isinstance(current, BytesStorageMetadata) else current
        value = self._resolver.value_of(setting, _parameters(planner, path, setting), current)
        if isinstance(current, torch.Tensor) and not isinstance(value, torch.Tensor):
            return torch.full_like(current, value)
        return value


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _require_kind(tensor: LogicalTensor, target: torch.Tensor) -> None:
    """Floating-point numbers go into such tensors, others into their own dtype (a count into any)."""
    stored = torch_dtype(tensor.dtype)
    if stored != target.dtype and tensor.shape and stored.is_floating_point != target.dtype.is_floating_point:
        raise CheckpointError(
            f"{tensor.name} is {tensor.dtype} in the checkpoint but {target.dtype} in the state dict: give a tensor of "
            "its dtype"
        )


def _current(planner: LoadPlanner, key: str) -> tuple[Any, Any]:
    """(path, value) of a key in the state dict that is being loaded into; (None, None) for unusual planners."""
    path = getattr(planner, "mappings", {}).get(key)
    return path, None if path is None else _get(planner.original_state_dict, path)


def _parameters(planner: LoadPlanner, path: Any, setting: Setting) -> list[str] | None:
    """The parameters of the group that the setting is of, as they are named in the state dict being loaded into."""
    if setting.parameter is not None:
        return [setting.parameter]
    listed = None if path is None else _get(planner.original_state_dict, (*path[:-1], "params"))
    if isinstance(listed, list) and all(isinstance(one, str) for one in listed):
        return list(listed)
    return None


def _get(value: Any, path: Any) -> Any:
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


class _Offered(Mapping[str, Any]):
    """Everything that can be loaded, under whatever key it is asked for."""

    def __init__(self, resolver: Resolver, partial: bool) -> None:
        self._resolver, self._partial = resolver, partial
        self._keys: dict[str, Any] | None = None
        self._known: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        found = self._find(key)
        if found is None:
            raise self._resolver.missing(key)
        return found

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        if self._find(key) is not None:
            return True
        if self._partial:
            return False
        raise self._resolver.missing(key)  # the planner's own error would not say what there is

    def __iter__(self) -> Iterator[str]:
        if self._keys is None:
            self._keys = dict(self._resolver.canonical())
        return iter(self._keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _find(self, key: str) -> Any:
        if key not in self._known:
            self._known[key] = self._describe(key)
        return self._known[key]

    def _describe(self, key: str) -> Any:
        if self._resolver.setting(key) is not None or key in self._resolver.values:
            return BytesStorageMetadata()
        name = self._resolver.tensor(key)
        if name is None:
            return None
        tensor = self._resolver.view.tensors[name]
        size = torch.Size(tensor.shape)
        whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
        return TensorStorageMetadata(TensorProperties(dtype=torch_dtype(tensor.dtype)), size, [whole])
