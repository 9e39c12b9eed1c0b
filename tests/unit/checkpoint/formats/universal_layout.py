"""DeepSpeed universal checkpoints as its own converter lays them out, written with `torch.save`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHAPES = {"embed.weight": (13, 5), "lift": (2, 3, 4), "norm.bias": (5,), "gain": (1,)}
GROUPS = [["embed.weight", "lift"], ["norm.bias", "gain"]]
HYPER: list[dict[str, Any]] = [
    {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1},
    {"lr": 0.2, "betas": (0.9, 0.95), "weight_decay": 0.0},
]
STATES = ("fp32", "exp_avg", "exp_avg_sq")
FROZEN = {"rotation.weight": (4, 3), "offset": (1,)}
STEP = 7


def numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected() -> dict[str, torch.Tensor]:
    """The trained tensors by the names of a view."""
    found = {}
    for at, (name, shape) in enumerate(SHAPES.items()):
        for index, state in enumerate(STATES):
            found[name if state == "fp32" else f"{name}.{state}"] = numbers(shape, 10 * at + index)
    return found


def frozen() -> dict[str, torch.Tensor]:
    return {name: numbers(shape, 90 + at).bfloat16() for at, (name, shape) in enumerate(FROZEN.items())}


def write(root: Path, *, stage: int, tag: str = "step7_universal", world: int = 3) -> Path:
    """The checkpoint of a bf16 run with two parameter groups, tied, frozen and buffer tensors; returns its folder."""
    folder = root / tag
    for name, shape in SHAPES.items():
        (folder / "zero" / name).mkdir(parents=True)
        for state in STATES:
            tensor = expected()[name if state == "fp32" else f"{name}.{state}"]
            held = {"param": tensor, "cat_dim": 0} if stage < 3 else tensor.flatten()
            torch.save(held, folder / "zero" / name / f"{state}.pt")
        if stage < 3:
            torch.save(torch.tensor(float(STEP)), folder / "zero" / name / "step.pt")
        assert torch.Size(shape) == tensor.shape
    _write_optimizer(folder, stage)
    for rank in range(world if stage == 3 else 1):
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        torch.save(_model(stage, rank, world), folder / f"{prefix}mp_rank_00_model_states.pt")
    (root / "latest_universal").write_text(tag)
    return folder


def _write_optimizer(folder: Path, stage: int) -> None:
    common = {"dynamic_loss_scale": False, "overflow": False, "zero_stage": stage, "ds_version": "0.19.8"}
    if stage < 3:
        groups = [{**hyper, "params": [index]} for index, hyper in enumerate(HYPER)]
        torch.save({**common, "param_groups": groups}, folder / "zero" / "optimizer_state.pt")
        for name in ("tied.weight", *FROZEN, "running"):  # what has no fragments is written from the module
            (folder / "zero" / name).mkdir()
            torch.save({"param": numbers((3, 2), 5)}, folder / "zero" / name / "fp32.pt")
        return
    groups = [{**HYPER[0], "params": [0, 1]}, {**HYPER[1], "params": [2]}]
    states = {index: {"step": torch.tensor(float(STEP)), "exp_avg": torch.zeros(9)} for index in range(3)}
    inner = {"state": states, "param_groups": groups}
    torch.save(
        {**common, "fp32_flat_groups": [torch.zeros(9)], "optimizer_state_dict": inner, "param_groups": groups},
        folder / "zero" / "optimizer_state.pt",
    )


def _model(stage: int, rank: int, world: int) -> dict[str, Any]:
    values = expected()
    weights = {name: values[name].bfloat16() if stage < 3 else torch.empty(0, dtype=torch.bfloat16) for name in SHAPES}
    held = frozen() if stage < 3 else {name: torch.empty(0, dtype=torch.bfloat16) for name in FROZEN}
    groups = GROUPS if stage < 3 else [["embed.weight"], ["lift"], ["norm.bias", "gain"]]
    return {
        "module": {**weights, "tied.weight": weights["embed.weight"], **held, "running": torch.arange(6.0)},
        "buffer_names": ["running"],
        "optimizer": None,
        "param_shapes": [{name: torch.Size(SHAPES[name]) for name in group} for group in groups],
        "frozen_param_shapes": {name: torch.Size(shape) for name, shape in FROZEN.items()} if stage > 1 else None,
        "frozen_param_fragments": _fragments(stage, rank, world) if stage > 1 else None,
        "shared_params": {"tied.weight": "embed.weight"},
        "lr_scheduler": {"last_epoch": STEP},
        "global_steps": STEP,
        "dp_world_size": world,
        "mp_world_size": 1,
        "ds_config": {"bf16": {"enabled": True}},
        "iteration": STEP,
    }


def _fragments(stage: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    if stage < 3:
        return frozen()
    found = {}
    for name, tensor in frozen().items():
        part = -(-tensor.numel() // world)
        padded = torch.cat([tensor.flatten(), torch.full((part * world - tensor.numel(),), float("nan")).bfloat16()])
        found[name] = padded[rank * part : (rank + 1) * part].clone()
    return found
