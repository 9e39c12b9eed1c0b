"""What metadata cost: opening a large checkpoint, planning one rank's restore, checking a commit, writing a part.

The parts of `RANKS` ranks are made without any tensor's bytes: 3,000 tensors divided by rows, as FSDP2 divides them,
and optimizer steps that each lie with one rank. The limit: `json.loads` of the same manifests, in the same round. Times
are medians, in microseconds per chunk; ratios are to that limit.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import store
from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.heap import uncollected
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.manifest import PartManifest, data_name, digest_of, directory_name, encode_part, part_name
from orchestrator.checkpoint.part_tensors import PartChunk, PartTensor
from orchestrator.checkpoint.reshard import plan_copies
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.types import SaveReport

RANKS = int(os.environ.get("REGROW_BENCH_RANKS", "64"))
ROUNDS = int(os.environ.get("REGROW_BENCH_ROUNDS", "5"))
LAYERS = 111
LAYER = {
    "attention.wq.weight": (4096, 4096),
    "attention.wk.weight": (1024, 4096),
    "attention.wv.weight": (1024, 4096),
    "attention.wo.weight": (4096, 4096),
    "feed_forward.w1.weight": (14336, 4096),
    "feed_forward.w2.weight": (4096, 14336),
    "feed_forward.w3.weight": (14336, 4096),
    "attention_norm.weight": (4096,),
    "ffn_norm.weight": (4096,),
}
STATES = (None, "exp_avg", "exp_avg_sq")
HEADER_BYTES = 8


def measure() -> dict[str, Any]:
    """Microseconds per chunk, and ratios to parsing the JSON alone."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        parts = [_part(rank, RANKS) for rank in range(RANKS)]
        reports, texts = _save(root, parts)
        chunks = sum(len(one.chunks) for part in parts for one in part.tensors)
        del parts[1:]  # a million objects more would be walked by every collection of garbage
        rows: dict[str, list[float]] = {name: [] for name in ("json", "commit", "open", "plan", "write")}
        for _ in range(ROUNDS):
            rows["json"].append(_seconds(lambda: _parse(texts)))
            rows["commit"].append(_seconds(lambda: _commit(root, reports)))
            views: list[UniversalView] = []
            path = directory_name(1, 1)
            rows["open"].append(_seconds(lambda: views.append(native.open_view(root, path))))  # noqa: B023
            rows["plan"].append(_seconds(lambda: _plan(views[0], RANKS // 3, max(1, RANKS * 3 // 4))))  # noqa: B023
            with uncollected():
                rows["write"].append(_seconds(lambda: encode_part(parts[0])))
            (root / path / "manifest.json").unlink()
    medians = {name: statistics.median(values) for name, values in rows.items()}
    counts = dict.fromkeys(medians, chunks) | {"write": sum(len(one.chunks) for one in parts[0].tensors)}
    per_chunk = {name: seconds / counts[name] * 1e6 for name, seconds in medians.items()}
    return {
        "ranks": RANKS,
        "chunks": chunks,
        "bytes_per_chunk": round(sum(map(len, texts)) / chunks, 1),
        "rounds": ROUNDS,
        "us_per_chunk": {name: round(value, 3) for name, value in per_chunk.items()},
        "ratio_to_json": {name: round(value / per_chunk["json"], 2) for name, value in per_chunk.items()},
    }


def _part(rank: int, ranks: int) -> PartManifest[tuple[PartTensor, ...]]:
    digests, position, tensors = random.Random(rank), HEADER_BYTES, []
    for parameter, state, shape, box in _boxes(rank, ranks):
        end = position + 4 * box.elements
        chunk = PartChunk(box, position, end, f"{digests.getrandbits(128):032x}")
        kind = "state" if state else "parameter"
        tensors.append(PartTensor(parameter, state, kind, "F32", shape, (chunk,)))
        position = end
    groups = [{"lr": 1e-4, "params": [f"layers.{layer}.{name}" for layer in range(LAYERS) for name in LAYER]}]
    state = {"param_groups": groups}
    header = digest_of(bytes(HEADER_BYTES))
    return PartManifest(1, 1, rank, ranks, position, HEADER_BYTES, header, tuple(tensors), state)


def _boxes(rank: int, ranks: int) -> Iterator[tuple[str, str | None, tuple[int, ...], Box]]:
    """What a rank saves: its rows of everything, and the steps that fall to it."""
    index = 0
    for layer in range(LAYERS):
        for name, shape in LAYER.items():
            box = _rows(shape, rank, ranks)
            for state in STATES if box.elements else ():
                yield f"layers.{layer}.{name}", state, shape, box
            if index % ranks == rank:
                yield f"layers.{layer}.{name}", "step", (), Box((), ())
            index += 1


def _rows(shape: tuple[int, ...], rank: int, ranks: int) -> Box:
    rows = -(-shape[0] // ranks)
    start = min(rank * rows, shape[0])
    return Box((start, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - start), *shape[1:]))


def _save(root: Path, parts: list[PartManifest[tuple[PartTensor, ...]]]) -> tuple[list[SaveReport], list[bytes]]:
    """Part manifests beside data files that are all hole."""
    folder = root / directory_name(1, 1)
    folder.mkdir()
    reports, texts = [], []
    for part in parts:
        text = encode_part(part)
        (folder / part_name(part.rank)).write_bytes(text)
        (folder / data_name(part.rank)).touch()
        os.truncate(folder / data_name(part.rank), part.file_bytes)
        path = f"{folder.name}/{part_name(part.rank)}"
        reports.append(SaveReport(1, 1, part.rank, path, digest_of(text), part.file_bytes + len(text), 0.0, 0.0))
        texts.append(text)
    return reports, texts


def _parse(texts: list[bytes]) -> None:
    with uncollected():
        for text in texts:
            json.loads(text)


def _commit(root: Path, reports: list[SaveReport]) -> None:
    store.commit(root, generation=1, step=1, world_size=len(reports), parts=reports)


def _plan(view: UniversalView, rank: int, ranks: int) -> None:
    """What a rank of another world size would read of every tensor."""
    for tensor in view.tensors.values():
        box = _rows(tensor.shape, rank, ranks) if tensor.shape else Box((), ())
        assert not plan_copies(box, tensor.chunks).missing


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
