"""Any view as a committed native checkpoint, divided over as many ranks as the next plan has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.checkpoint.durable import write_synced
from orchestrator.checkpoint.layout import Box, LogicalTensor
from orchestrator.checkpoint.manifest import (
    PartManifest,
    data_name,
    digest_of,
    directory_name,
    encode_part,
    part_name,
)
from orchestrator.checkpoint.part_tensors import PartChunk, PartTensor
from orchestrator.checkpoint.root import create_root
from orchestrator.checkpoint.safetensors_layout import Wanted, safetensors_file
from orchestrator.checkpoint.store import commit, fenced
from orchestrator.checkpoint.stream import Limits, OutputFile, Progress
from orchestrator.checkpoint.target import Digests, partial
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import InvalidInput
from orchestrator.core.types import SaveReport


def write_native(view: UniversalView, root: Path, *, ranks: int, limits: Limits, progress: Progress) -> Path:
    """Write and commit `view` under `root` in `ranks` parts; returns the checkpoint's directory.

    Every tensor is divided over the ranks along its first dimension, as FSDP2 divides it; any mesh reads it. Its
    generation is the newest that has begun under `root` (1 in a new one). It is durable when this returns, as every
    commit is. Raises `InvalidInput` for fewer than 1 rank, `Conflict` when that step is there, and what reading,
    writing and committing raise.
    """
    if ranks < 1:
        raise InvalidInput(f"a checkpoint cannot be divided over {ranks} ranks: give at least 1")
    base = create_root(root)
    generation = max(1, fenced(base))
    target = base / directory_name(view.step, generation)
    wanted = [_wanted(view, rank, ranks) for rank in range(ranks)]
    outputs = [safetensors_file(data_name(rank), one, {"format": "regrow"}) for rank, one in enumerate(wanted)]
    with partial(target) as folder:
        plan = [(one.name, one.size_bytes, digest_of(one.literals[0][1])) for one in outputs]
        digests = folder.fill(view, outputs, plan, replace(limits, durable=True), progress)
        reports = []
        for rank, output in enumerate(outputs):
            part = _part(view, generation, rank, ranks, output, digests)
            text = encode_part(part)
            write_synced(folder.directory / part_name(rank), text)
            path = f"{target.name}/{part_name(rank)}"
            size_bytes = output.size_bytes + len(text)
            reports.append(SaveReport(generation, view.step, rank, path, digest_of(text), size_bytes, 0.0, 0.0))
        folder.publish()
    commit(base, generation=generation, step=view.step, world_size=ranks, parts=reports)
    return target


def _wanted(view: UniversalView, rank: int, ranks: int) -> list[Wanted]:
    wanted = []
    for tensor in view.tensors.values():
        box = _share(tensor.shape, rank, ranks)
        if box is not None:
            key = f"{tensor.name}@{','.join(map(str, box.offsets))}"
            wanted.append(Wanted(key, tensor.name, box, tensor.dtype))
    return wanted


def _share(shape: tuple[int, ...], rank: int, ranks: int) -> Box | None:
    """What a rank holds of a tensor: rows as `torch.chunk` divides them, scalars on rank 0; None = nothing."""
    if not shape:
        return Box((), ()) if rank == 0 else None
    rows = -(-shape[0] // ranks)
    start = min(rank * rows, shape[0])
    box = Box((start, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - start), *shape[1:]))
    return box if box.elements else None


def _part(
    view: UniversalView, generation: int, rank: int, ranks: int, output: OutputFile, digests: Digests
) -> PartManifest[tuple[PartTensor, ...]]:
    header = output.literals[0][1]
    chunks: dict[str, list[PartChunk]] = {name: [] for name in view.tensors}
    for segment in output.segments:
        digest = digests[rank, segment]
        chunks[segment.tensor].append(PartChunk(segment.box, segment.begin, segment.end, digest))
    tensors = tuple(_tensor(one, chunks[one.name]) for one in view.tensors.values())
    state = {key: value for key, value in view.state.items() if _is_json(value)}
    return PartManifest(
        generation, view.step, rank, ranks, output.size_bytes, len(header), digest_of(header), tensors, state
    )


def _tensor(one: LogicalTensor, chunks: Sequence[PartChunk]) -> PartTensor:
    return PartTensor(one.parameter, one.state, one.kind, one.dtype, one.shape, tuple(chunks))


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
