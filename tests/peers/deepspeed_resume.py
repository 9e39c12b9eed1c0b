"""Goes on from a universal checkpoint in DeepSpeed's form, at any world size, and says how the losses go.

    python -m torch.distributed.run --nproc-per-node W --module tests.peers.deepspeed_resume \
        --name z1-fp32-w4 --root FOLDER --steps 3

FOLDER holds `latest_universal` and the folder it names. Rank 0 prints `LOSSES [...]`; with `--loaded FILE` it saves the
live state before the first step, and beside it as JSON what is not a tensor. With `--module FILE` it first loads what
that model file has in `module`: DeepSpeed restores neither buffers nor what is not trained. With `--spoiled` its
learning rates are wrong before the checkpoint is loaded. Every world size sees the same examples, so losses are
comparable.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file

from tests.peers import deepspeed_models as models
from tests.peers.cases import RUNS
from tests.peers.deepspeed_live import snapshot
from tests.peers.deepspeed_maker import configuration

ROWS = 12
FIRST_STEP = 100
"""Steps of the data that no run was trained on."""


def main() -> None:
    given = _arguments()
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo")
    engine = _resumed(given)
    if given.loaded:
        _save_live(engine, given.loaded)
    losses = _losses(engine, given.steps)
    if dist.get_rank() == 0:
        print("LOSSES", json.dumps(losses), flush=True)
    dist.barrier()
    os._exit(0)  # at a proper end one in forty processes aborts in DeepSpeed's own code: a thread that nobody joins


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--loaded", type=Path)
    parser.add_argument("--module", type=Path)
    parser.add_argument("--spoiled", action="store_true")
    return parser.parse_args()


def _resumed(given: argparse.Namespace) -> deepspeed.DeepSpeedEngine:
    run = RUNS[given.name]
    torch.manual_seed(99)
    model = models.Net(run)
    if given.module:
        model.load_state_dict(torch.load(given.module, weights_only=False)["module"], strict=False)
    optimizer = models.optimizer(run, model)
    for group in optimizer.param_groups if given.spoiled else []:
        group["lr"] *= 10
    settings = configuration(run) | {
        "checkpoint": {"load_universal": True},
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    engine.load_checkpoint(str(given.root))
    for state in engine.optimizer.optimizer.state.values():
        ordered = dict(sorted(state.items()))  # DeepSpeed restores them in the order of a set, on each rank another
        state.clear()
        state.update(ordered)
    return engine


def _save_live(engine: deepspeed.DeepSpeedEngine, file: Path) -> None:
    live = snapshot(engine)
    if dist.get_rank() == 0:
        save_file(live.tensors, file)
        groups = [{key: group[key] for key in ("lr", "weight_decay")} for group in engine.optimizer.param_groups]
        known = {"scalars": live.scalars, "groups": groups, "global_steps": engine.global_steps}
        file.with_suffix(".json").write_text(json.dumps(known))


def _losses(engine: deepspeed.DeepSpeedEngine, steps: int) -> list[float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(FIRST_STEP, FIRST_STEP + steps):
        tokens, targets = models.batch(0, step, ROWS)
        mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        loss = engine(tokens[mine], targets[mine])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


if __name__ == "__main__":
    main()
