"""Filling this rank's shards from a checkpoint of any mesh: each rank reads exactly the bytes of its own boxes."""

from __future__ import annotations

import torch

from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError
from orchestrator.trainer.chunks import DTYPES, NAMES, empty_box, writable_bytes
from orchestrator.trainer.layouts import Layouts, local_tensor
from orchestrator.trainer.state import Entry, Tracked


def restore(view: UniversalView, tracked: Tracked, layouts: Layouts) -> None:
    """Load model, optimizer and extra objects; raises `CheckpointError` when the checkpoint does not fit the model."""
    tracked.create_states(
        (tensor.parameter, tensor.state, DTYPES[tensor.dtype], tuple(tensor.shape))
        for tensor in view.tensors.values()
        if tensor.state is not None
    )
    for entry in tracked.entries():
        _fill(view, entry, layouts)
    tracked.load_json_state(view.state)


@torch.no_grad()
def _fill(view: UniversalView, entry: Entry, layouts: Layouts) -> None:
    stored = view.tensors.get(entry.name)
    if stored is None:
        raise CheckpointError(f"the checkpoint of step {view.step} has no {entry.name}: it was made by another model")
    if tuple(stored.shape) != tuple(entry.tensor.shape):
        raise CheckpointError(
            f"{entry.name} has shape {tuple(stored.shape)} in the checkpoint of step {view.step} but "
            f"{tuple(entry.tensor.shape)} in the model: restore it into the model that it was made by"
        )
    local = local_tensor(entry.tensor)
    if local.numel() == 0:
        return
    box = layouts.of(entry.tensor).box
    if local.device.type == "cpu" and local.is_contiguous() and NAMES[local.dtype] == stored.dtype:
        view.read(entry.name, box, writable_bytes(local))
        return
    staged = empty_box(box, stored.dtype)
    view.read(entry.name, box, writable_bytes(staged))
    local.copy_(staged)
