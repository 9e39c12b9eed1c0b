"""Loading another mesh: `dcp.load` with regrow's reader against torch's own, in the same processes.

About 1.75 GB of fp32 weights and Adam moments, saved by FSDP2 over 4 ranks, loaded over 2, turn about, in the page
cache. The limit: every byte is copied once from the page cache into its tensor.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.formats.torch_api import UniversalReader

ROUNDS = int(os.environ.get("REGROW_BENCH_ROUNDS", "5"))
LAYERS = int(os.environ.get("REGROW_BENCH_LAYERS", "12"))
HIDDEN, VOCABULARY = 896, 20000


def measure() -> dict[str, Any]:
    """Medians of seconds: building the view, loading with ours and with torch's reader, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mp.spawn(_save, (folder,), nprocs=4)
        mp.spawn(_load, (folder,), nprocs=2)
        seconds: dict[str, list[float]] = json.loads((folder / "seconds.json").read_text())
        size_bytes = sum(path.stat().st_size for path in (folder / "saved").iterdir())
        views = [_view_s(folder / "saved") for _ in range(ROUNDS)]
    ours, peer = statistics.median(seconds["ours"]), statistics.median(seconds["torch"])
    return {
        "bytes": size_bytes,
        "rounds": ROUNDS,
        "view_s": statistics.median(views),
        "seconds": ours,
        "dcp_load_s": peer,
        "ratio": ours / peer,
    }


def _view_s(saved: Path) -> float:
    """Seconds until the view of all tensors is there, from metadata alone."""
    began = time.perf_counter()
    open_checkpoint(saved)
    return time.perf_counter() - began


def _state(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """A sharded model's and its optimizer's state, the moments made as Adam makes them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    blocks = [
        torch.nn.Sequential(torch.nn.Linear(HIDDEN, 7 * HIDDEN), torch.nn.Linear(7 * HIDDEN, HIDDEN))
        for _ in range(LAYERS)
    ]
    model = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, HIDDEN), *blocks)
    mesh = init_device_mesh("cpu", (world,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optim": states}


def _save(rank: int, folder: Path) -> None:
    dcp.save(_state(rank, 4, folder), checkpoint_id=folder / "saved")
    dist.destroy_process_group()


def _load(rank: int, folder: Path) -> None:
    state = _state(rank, 2, folder)
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(ROUNDS + 1):  # the first round warms both up
        for name, reader in (("ours", UniversalReader), ("torch", dcp.FileSystemReader)):
            dist.barrier()
            began = time.perf_counter()
            dcp.load(state, storage_reader=reader(folder / "saved"))
            dist.barrier()
            seconds[name].append(time.perf_counter() - began)
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps({name: values[1:] for name, values in seconds.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    json.dump(measure(), sys.stdout, indent=2)
