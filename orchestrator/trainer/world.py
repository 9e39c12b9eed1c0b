"""Joining the other ranks: the launch order, the device, the process group and the device mesh."""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from orchestrator import wire
from orchestrator.core.errors import InvalidInput
from orchestrator.core.types import (
    AXES,
    AssignedNode,
    Assignment,
    BatchSplit,
    Entrypoint,
    Generation,
    LaunchOrder,
    Mesh,
    Plan,
)


@dataclass(frozen=True, slots=True)
class World:
    """A process among the ranks."""

    rank: int
    device: torch.device
    mesh: DeviceMesh
    control: dist.ProcessGroup
    """Gloo group of all ranks, used by nothing but the session's own agreement."""


def read_order(environment: dict[str, str]) -> LaunchOrder | None:
    """The order that the agent left for its workers, or None when the script runs on its own."""
    path = environment.get("REGROW_ORDER")
    if path is None:
        return None
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise InvalidInput(f"cannot read the launch order {path} named by REGROW_ORDER: {error.strerror}") from error
    order: LaunchOrder = wire.loads(text, LaunchOrder)
    return order


def own_order(mesh: Mesh, global_batch: int, micro_batch: int | None, seed: int) -> LaunchOrder:
    """An order for a script that runs without an agent: nothing is restored or saved."""
    plan = Plan(mesh, split_batch(mesh, global_batch, micro_batch))
    assignment = Assignment((AssignedNode("local", 0, mesh.world_size),))
    return LaunchOrder(
        job="local",
        generation=Generation(0, plan, assignment),
        entrypoint=Entrypoint(""),
        checkpoint_uri="",
        checkpoint_path=None,
        save_every_s=None,
        save_every_steps=None,
        store=None,
        seed=seed,
    )


def split_batch(mesh: Mesh, global_batch: int, micro_batch: int | None) -> BatchSplit:
    """Samples divided as evenly as they go; one micro-batch per replica and pipeline stage unless told."""
    each, left = divmod(global_batch, mesh.dp_degree)
    if each == 0:
        raise InvalidInput(
            f"a global batch of {global_batch} cannot feed {mesh.dp_degree} data-parallel replicas: "
            f"pass Session(global_batch=...) of at least {mesh.dp_degree}"
        )
    most = each + (left > 0)
    size = micro_batch or -(-most // mesh.pp)
    samples = tuple(each + (replica < left) for replica in range(mesh.dp_degree))
    return BatchSplit(global_batch, size, max(-(-most // size), mesh.pp), samples)


def choose_device(name: str | None) -> torch.device:
    """`name` ("cpu" or "cuda"), else a GPU of one's own where there is one, else the CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name is None:
        name = "cuda" if torch.cuda.is_available() and local_size <= torch.cuda.device_count() else "cpu"
    if name == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(name)


def join(mesh: Mesh, device: torch.device) -> World:
    """Form the process group and the mesh, one dimension per axis of `AXES` in that order."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size != mesh.world_size:
        raise InvalidInput(
            f"the mesh {mesh} has {mesh.world_size} ranks but WORLD_SIZE is {size}: start as many workers as ranks"
        )
    if not dist.is_initialized():
        _init_process_group(rank, size, device)
    device_mesh = init_device_mesh(device.type, mesh.sizes, mesh_dim_names=AXES)
    return World(rank, device, device_mesh, dist.new_group(backend="gloo"))


def _init_process_group(rank: int, size: int, device: torch.device) -> None:
    atexit.register(_leave)
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, rank=rank, world_size=size, device_id=device_id)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id)


def _leave() -> None:
    """At exit: torch's threads must end before the interpreter does, else the process may abort although all went well
    (pytorch/pytorch#190489).

    Not after an exception: peers may wait for this rank in a collective, and leaving would wait for them.
    """
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()
