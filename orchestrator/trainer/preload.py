"""What a warm process does once, so that the workers forked from it need not.

Imports everything that a training script uses and runs one training step of a tiny module, which imports what torch
loads on first use. Nothing here starts a thread or opens a process group, neither of which survives a fork: the caller
must have set `OMP_NUM_THREADS=1` (or keep to one thread), because a child hangs after a parent used an OpenMP team.
"""

from __future__ import annotations

import gc
import importlib

MODULES = (
    "numpy.ma",
    "torch",
    "torch.distributed",
    "torch.distributed._functional_collectives",
    "torch.distributed.checkpoint.planner_helpers",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "torch.optim.lr_scheduler",
    "orchestrator.trainer.session",
)


def preload() -> None:
    """Import and warm up; takes two to four seconds of one core, and then saves them in every worker."""
    for module in MODULES:
        importlib.import_module(module)
    _read_an_order()
    _train_once()
    gc.collect()
    gc.freeze()  # a collection in a child would otherwise copy every page of the parent


def _read_an_order() -> None:
    """Have the JSON codec of launch orders compiled."""
    from orchestrator import wire
    from orchestrator.core.types import LaunchOrder, Mesh
    from orchestrator.trainer.world import own_order

    wire.loads(wire.dumps(own_order(Mesh(), 1, None, 0)), LaunchOrder)


def _train_once() -> None:
    """Forward, backward and optimizer step of one small matrix, in this thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = torch.nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2)).log_softmax(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.set_num_threads(threads)
