"""Tensors laid out in safetensors files, before any of their bytes is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.checkpoint.layout import ITEM_BYTES, Box
from orchestrator.checkpoint.stream import OutputFile, cut


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor of the view that a file is to hold under a key."""

    key: str
    tensor: str
    box: Box
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return self.box.elements * ITEM_BYTES[self.dtype]


def safetensors_file(name: str, wanted: Sequence[Wanted], metadata: Mapping[str, str]) -> OutputFile:
    """One file: its header, and where each tensor goes, widest items first so that all are aligned."""
    ordered = sorted(wanted, key=lambda one: -ITEM_BYTES[one.dtype])
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for one in ordered:
        end = position + one.size_bytes
        header[one.key] = {"dtype": one.dtype, "shape": one.box.sizes, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    segments = []
    for one in ordered:
        if one.box.elements:
            segments += cut(one.tensor, one.box, one.dtype, begin)
            begin += one.size_bytes
    return OutputFile(name, begin, ((0, len(text).to_bytes(8, "little") + text),), tuple(segments))


def shards(wanted: Iterable[Wanted], largest_bytes: int) -> list[list[Wanted]]:
    """The tensors, in their order, divided so that no shard is larger unless one tensor alone is."""
    groups: list[list[Wanted]] = [[]]
    size_bytes = 0
    for one in wanted:
        if groups[-1] and size_bytes + one.size_bytes > largest_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(one)
        size_bytes += one.size_bytes
    return groups


def index_file(files: Sequence[tuple[str, Sequence[Wanted]]]) -> bytes:
    """Hugging Face's index: which file holds which key, and the bytes of all."""
    total = sum(one.size_bytes for _, wanted in files for one in wanted)
    weights = {one.key: name for name, wanted in files for one in wanted}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=2).encode() + b"\n"
