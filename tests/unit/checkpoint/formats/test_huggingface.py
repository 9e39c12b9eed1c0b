"""Weights in a `torch.save` file of one's own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from orchestrator.checkpoint.formats import open_checkpoint


def test_what_a_file_holds_beside_weights_is_named(tmp_path: Path) -> None:
    net = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, tmp_path / "last.pt")
    view = open_checkpoint(tmp_path / "last.pt")
    assert set(view.tensors) == {"weight", "bias"}
    assert view.notes == (f"weights only: of {tmp_path.name}/last.pt this is not read: optimizer, epoch",)


def test_a_state_dict_alone_is_read_whole(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "weights.pth")
    view = open_checkpoint(tmp_path)
    assert set(view.tensors) == {"weight", "bias"}
    assert view.notes == ("weights only: the source holds no optimizer state",)
