"""Small models saved by torch itself, for the tests of distributed checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.formats import Reading
from orchestrator.checkpoint.formats import dcp as source
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.view import UniversalView


def trained(
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, steps: int = 2, groups: bool = True, **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with batch normalisation and a buffer, after a few steps."""
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3, bias=False))
    model.register_buffer("table", torch.arange(5))
    if groups:
        decayed = [one for one in model.parameters() if one.ndim > 1]
        rest = [one for one in model.parameters() if one.ndim < 2]
        made = optimizer([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.1 * steps, **settings)
    else:
        made = optimizer(model.parameters(), lr=0.1 * steps, **settings)
    for _ in range(steps):
        model(torch.randn(4, 8)).square().sum().backward()
        made.step()
        made.zero_grad()
    return model, made


def save(state: dict[str, Any], directory: Path, writer: Any = None, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        where = {"checkpoint_id": directory} if writer is None else {"storage_writer": writer}
        dcp.save(state, no_dist=True, **where, **options)
    return directory


def opened(directory: Path, tag: str | None = None) -> UniversalView:
    files = LocalFiles(directory)
    assert source.recognise(files)
    return source.open_files(files, Reading(tag))


def read(view: UniversalView, name: str) -> bytes:
    tensor = view.tensors[name]
    out = np.empty(tensor.size_bytes, np.uint8)
    view.read(name, Box.whole(tensor.shape), out)
    return out.tobytes()


def contents(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_holds(view: UniversalView, weights: dict[str, torch.Tensor], states: dict[str, dict[str, Any]]) -> None:
    """Exactly these tensors, bit for bit."""
    expected = dict(weights) | {f"{name}.{key}": value for name, own in states.items() for key, value in own.items()}
    assert view.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert view.tensors[name].shape == tuple(value.shape), name
        assert read(view, name) == contents(value), name
