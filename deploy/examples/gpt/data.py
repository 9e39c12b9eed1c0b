"""Text that every machine has: the bytes of the Python standard library's own source files."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

LIMIT_BYTES = 2_000_000
"""Enough for the example, and read in a few milliseconds."""


def read_sources(limit_bytes: int = LIMIT_BYTES) -> bytes:
    """The first `limit_bytes` of the library's top-level modules, concatenated in the order of their names."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return bytes(text[:limit_bytes])


class Text:
    """Windows of `length` bytes and, as targets, the same windows one byte further on."""

    def __init__(self, text: bytes, length: int) -> None:
        self.length = length
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.data[index * self.length : (index + 1) * self.length + 1].long()
        return window[:-1], window[1:]
