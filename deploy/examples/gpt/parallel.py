"""Spreading the model over `session.mesh`: tensor parallel, sharded data parallel, pipeline."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from model import GPT, Config, initialise
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from orchestrator.trainer import Session


def build(session: Session, config: Config, seed: int) -> GPT:
    """The rank's stage of the model, initialised as a whole and then sharded."""
    model = GPT(config, stage_layers(session, config))
    initialise(model, config, seed)
    model.to(session.device)
    model.recompute(session.plan.recomputation)
    if session.mesh["tp"].size() > 1:
        shard_tensors(model, session.mesh["tp"])
    if session.plan.mesh.dp_degree > 1:
        shard_data(model, session.mesh)
    return model


def stage_layers(session: Session, config: Config) -> range:
    """Layers of this rank's pipeline stage: as the plan says, else as even as it goes."""
    stages, stage = session.plan.mesh.pp, session.mesh["pp"].get_local_rank()
    sizes = session.plan.stage_layers or [(config.layers + stages - 1 - i) // stages for i in range(stages)]
    ends = list(accumulate(sizes, initial=0))
    return range(ends[stage], ends[stage + 1])


def shard_tensors(model: GPT, mesh: DeviceMesh) -> None:
    """Megatron's column and row splits; between them activations are sharded along the sequence."""
    whole = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    present = {name: style for name, style in whole.items() if getattr(model, name) is not None}
    parallelize_module(model, mesh, present, src_data_rank=None)
    for layer in model.layers.values():
        gather = {"input_layouts": (Shard(1), None, None), "desired_input_layouts": (Replicate(), None, None)}
        plan = {
            "attention_norm": SequenceParallel(),
            "attention": PrepareModuleInput(**gather),
            "attention.wq": ColwiseParallel(),
            "attention.wk": ColwiseParallel(),
            "attention.wv": ColwiseParallel(),
            "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
            "ffn_norm": SequenceParallel(),
            "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            "feed_forward.w1": ColwiseParallel(),
            "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
            "feed_forward.w3": ColwiseParallel(),
        }
        parallelize_module(layer, mesh, plan, src_data_rank=None)


def shard_data(model: GPT, mesh: DeviceMesh) -> None:
    """FSDP2 over `dp_shard`, replicated over `dp_replicate` (HSDP)."""
    data_mesh = mesh["dp_replicate", "dp_shard"] if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]
    for layer in model.layers.values():
        fully_shard(layer, mesh=data_mesh)
    fully_shard(model, mesh=data_mesh)


def pipeline(
    session: Session, model: GPT, loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Schedule1F1B:
    """One-forward-one-backward over the `pp` ranks; `loss_fn` already holds the scale, so gradients are summed."""
    mesh = session.mesh["pp"]
    stage = PipelineStage(model, mesh.get_local_rank(), mesh.size(), session.device, group=mesh.get_group())
    return Schedule1F1B(stage, session.plan.batch.micro_batches, loss_fn, scale_grads=False)
