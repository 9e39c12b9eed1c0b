"""Makes every run of one launch, one after another in the same processes: imports and start-up cost more than training.

    python -m torch.distributed.run --nproc-per-node W --module tests.peers.deepspeed_maker --launch w2 --out FOLDER

writes for each run `checkpoint/` (what save_checkpoint writes), `live.safetensors` and `live.json` (`deepspeed_live`),
and `universal/` with `universal.json`: what DeepSpeed's own converter makes of it, or how it fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import groups as process_groups
from safetensors.torch import load_file, save_file

from tests.peers import deepspeed_models as models
from tests.peers import deepspeed_parallel as parallel
from tests.peers.cases import Run, launches
from tests.peers.deepspeed_live import Snapshot, snapshot

TAG = "step"
CLIENT_STATE = {"iteration": 3, "epoch": 1, "note": "regrow", "options": argparse.Namespace(layers=2, name="net")}


def configuration(run: Run) -> dict[str, Any]:
    given: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
        "zero_optimization": {"stage": run.stage} | run.zero,
    }
    if run.dtype == "bf16":
        given["bf16"] = {"enabled": True}
    if run.dtype == "fp16":
        given["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return given | run.config


def train(run: Run) -> tuple[Any, list[dict[str, Any]]]:
    """An engine after its steps, and the optimizer's groups by name."""
    torch.manual_seed(17)
    model = models.Net(run)
    groups = models.groups(run, model)
    optimizer = models.optimizer(run, model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5) if run.scheduler else None
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=configuration(run), dist_init_required=False
    )
    for step in range(run.steps):
        engine.backward(engine(*models.batch(dist.get_rank(), step)))
        engine.step()
    return engine, groups


def describe(run: Run, engine: Any, live: Snapshot, groups: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    hyper = [
        {key: value for key, value in group.items() if key != "params" and isinstance(value, int | float | tuple | str)}
        for group in engine.optimizer.param_groups
    ]
    return {
        "about": run.about,
        "tag": TAG,
        "world": run.world,
        "optimizer": type(engine.optimizer).__name__,
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "scalars": live.scalars,
        "groups": [{"names": group["names"], "hyper": given} for group, given in zip(groups, hyper, strict=True)],
        "aliases": {"head.weight": "embed.weight"} if run.tied else {},
        "client_state": {key: value for key, value in CLIENT_STATE.items() if key != "options"},
        "seconds": seconds,
    }


def make(run: Run, home: Path) -> None:
    started = time.perf_counter()
    checkpoint = home / "checkpoint"
    if run.tp == run.pp == 1:
        engine, groups = train(run)
        live = snapshot(engine)
        engine.save_checkpoint(str(checkpoint), tag=TAG, client_state=dict(CLIENT_STATE))
        known = describe(run, engine, live, groups, time.perf_counter() - started)
    else:
        engine, live, known = parallel.make(run, configuration(run), checkpoint, TAG, dict(CLIENT_STATE))
        known["seconds"] = time.perf_counter() - started
    if dist.get_rank() == 0:
        save_file(live.tensors, home / "live.safetensors")
        (home / "live.json").write_text(json.dumps(known, indent=1, sort_keys=True))
    dist.barrier()
    if hasattr(engine.optimizer, "destroy"):
        engine.destroy()
    process_groups.mpu = None
    gc.collect()


def convert(run: Run, home: Path) -> None:
    """DeepSpeed's own converter; how it fails is a result, too."""
    arguments = argparse.Namespace(
        input_folder=str(home / "checkpoint" / TAG),
        output_folder=str(home / "universal" / TAG),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=run.stage < 3 and run.tp == run.pp == 1,
    )
    result: dict[str, Any] = {"converted": True}
    try:
        ds_to_universal.main(arguments)
        result["wrong"] = wrong(load_file(home / "live.safetensors"), home / "universal" / TAG / "zero")
    except Exception as error:
        result = {"converted": False, "error": f"{type(error).__name__}: {error}".replace(str(home), ".")}
    (home / "universal.json").write_text(json.dumps(result, indent=1))


def wrong(live: dict[str, torch.Tensor], zero: Path) -> list[str]:
    """What the converter left out or changed, of all that training changed."""
    found = []
    for key, expected in live.items():
        kind, _, name = key.partition("/")
        if kind not in {"master", "state"}:
            continue
        state, _, name = ("fp32", "", name) if kind == "master" else name.partition("/")
        file = zero / name / f"{state}.pt"
        given = torch.load(file, weights_only=False) if file.is_file() else None
        given = given["param"] if isinstance(given, dict) else given
        if given is None or not torch.equal(given.reshape(-1), expected.reshape(-1)):
            found.append(key)
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--launch", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # DeepSpeed asks whether fp16 is fast on this processor; PyTorch computes it on every one.
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo")
    runs = [run for run in launches()[given.launch] if not given.only or run.name in given.only.split(",")]
    for run in runs:
        home = given.out / run.name
        home.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        print(f"== {run.name}", flush=True)
        try:
            make(run, home)
        except BaseException:
            print(f"== FAILED {run.name}\n{traceback.format_exc()}", flush=True)
            raise
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank == 0:
        os.environ["TQDM_DISABLE"] = "1"
        for run in runs:
            convert(run, given.out / run.name)


if __name__ == "__main__":
    main()
