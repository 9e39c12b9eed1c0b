"""What is made: a table of runs. Standard library only, because DeepSpeed's environment reads it, too."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Run:
    """One training run whose checkpoint is kept. `zero` and `config` are merged into DeepSpeed's own configuration."""

    name: str
    stage: int
    dtype: str
    world: int
    about: str = ""
    tp: int = 1
    pp: int = 1
    groups: int = 1
    frozen: bool = False
    buffers: bool = False
    unused: bool = False
    tied: bool = False
    optimizer: str = "adamw"
    scheduler: bool = False
    steps: int = 3
    variant: str = ""
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    client: dict[str, Any] = field(default_factory=dict)

    @property
    def launch(self) -> str:
        """The launch that this run shares its processes with."""
        return f"w{self.world}" if self.tp == self.pp == 1 else f"pp{self.pp}-tp{self.tp}-w{self.world}"


FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}


def _run(name: str, stage: int, dtype: str, world: int, about: str, **settings: Any) -> Run:
    return Run(f"z{stage}-{dtype}-w{world}-{name}", stage, dtype, world, about, **settings)


def _plain() -> list[Run]:
    return [
        Run(f"z{stage}-{dtype}-w{world}", stage, dtype, world, "one parameter group, AdamW")
        for world, stage, dtype in product((1, 2, 3, 4), (0, 1, 2, 3), DTYPES)
    ]


def _special() -> list[Run]:
    runs = []
    for stage, dtype, world in (
        (1, "fp32", 4),
        (1, "bf16", 3),
        (2, "bf16", 3),
        (2, "fp16", 2),
        (3, "bf16", 4),
        (3, "fp32", 3),
    ):
        about = "three parameter groups with their own lr and weight decay, one of a single element"
        runs.append(_run("groups", stage, dtype, world, about, groups=3))
    for stage, world in ((1, 2), (1, 3), (2, 4), (2, 3)):
        about = "parameters in round-robin order"
        runs.append(_run("roundrobin", stage, "bf16", world, about, zero={"round_robin_gradients": True}))
    about = "round-robin order within each of three groups"
    runs.append(_run("roundrobin-groups", 2, "fp32", 3, about, groups=3, zero={"round_robin_gradients": True}))
    for stage, dtype, world in (
        (0, "fp32", 2),
        (1, "fp32", 2),
        (1, "bf16", 3),
        (2, "bf16", 2),
        (3, "bf16", 4),
        (3, "fp32", 3),
    ):
        about = "frozen parameters and buffers"
        runs.append(_run("frozen", stage, dtype, world, about, frozen=True, buffers=True))
        runs.append(_run("unused", stage, dtype, world, "a layer that forward never calls", unused=True))
    for stage, dtype, world in (
        (1, "fp32", 2), (1, "fp32", 3), (1, "bf16", 4), (2, "fp32", 2), (2, "bf16", 2), (3, "fp32", 2), (3, "bf16", 3),
    ):  # fmt: skip
        runs.append(_run("tied", stage, dtype, world, "the output layer shares the embedding's weight", tied=True))
    for dtype, world in (("fp32", 2), ("bf16", 3)):
        about = "many small sub-groups"
        runs.append(_run("subgroups", 3, dtype, world, about, zero={"sub_group_size": 500}))
        about = "several groups, each in small sub-groups"
        runs.append(_run("subgroups-groups", 3, dtype, world, about, groups=3, zero={"sub_group_size": 100}))
    for stage, dtype, world in ((1, "bf16", 3), (2, "fp32", 4), (1, "fp16", 2)):
        about = "each parameter starts at a multiple of 16 bytes"
        runs.append(_run("aligned", stage, dtype, world, about, zero={"parameter_alignment": True}))
    about = "aligned parameters in round-robin order, three groups"
    settings: dict[str, Any] = {"parameter_alignment": True, "round_robin_gradients": True}
    runs.append(_run("aligned-roundrobin", 2, "bf16", 3, about, groups=3, zero=settings))
    for world in (1, 2, 4):
        runs.append(_run("master", 1, "bf16", world, "BF16_Optimizer", config=FP32_GRADIENTS))
    about = "BF16_Optimizer with a group smaller than its padding"
    runs.append(_run("master-groups", 1, "bf16", 4, about, groups=3, config=FP32_GRADIENTS))
    about = "BF16_Optimizer, tied weights, frozen parameters and buffers"
    runs.append(_run("master-tied", 1, "bf16", 3, about, tied=True, frozen=True, buffers=True, config=FP32_GRADIENTS))
    for stage, dtype, world in ((1, "fp32", 2), (2, "bf16", 3)):
        about = "elastic_checkpoint: states without padding"
        runs.append(_run("elastic", stage, dtype, world, about, zero={"elastic_checkpoint": True}))
    about = "elastic_checkpoint with three groups"
    runs.append(_run("elastic-groups", 2, "bf16", 4, about, groups=3, zero={"elastic_checkpoint": True}))
    about = "BF16_Optimizer with elastic_checkpoint"
    elastic: dict[str, Any] = {"elastic_checkpoint": True}
    runs.append(_run("master-elastic", 1, "bf16", 2, about, zero=elastic, config=FP32_GRADIENTS))
    for stage in (0, 1, 3):
        runs.append(_run("scheduler", stage, "fp32", 2, "a learning-rate scheduler", scheduler=True))
    for stage, optimizer in product((0, 1, 3), ("sgd", "rmsprop", "adagrad")):
        runs.append(_run(optimizer, stage, "fp32", 2, f"{optimizer} instead of AdamW", optimizer=optimizer))
    runs.append(_run("sgd", 2, "bf16", 3, "SGD with momentum, bf16", optimizer="sgd"))
    overflow = {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}
    for stage in (2, 3):
        about = "fp16 whose first steps overflow and are skipped: fewer optimizer steps than global steps"
        runs.append(_run("skipped", stage, "fp16", 2, about, config=overflow, steps=14))
    for stage in (1, 3):
        about = "everything at once: groups, tied, frozen, buffers, unused"
        everything: dict[str, Any] = dict.fromkeys(("tied", "frozen", "buffers", "unused"), True)
        runs.append(_run("all", stage, "bf16", 3, about, groups=3, **everything))
    return runs


def _parallel() -> list[Run]:
    runs = []
    for dtype, config in (("fp32", {}), ("bf16", {}), ("bf16", FP32_GRADIENTS), ("fp16", {})):
        suffix = "-master" if config else ""
        for pp, tp in ((2, 1), (1, 2), (2, 2)):
            run = Run("", 1, dtype, 4, "", tp=tp, pp=pp, config=config)
            about = f"{pp} pipeline stages, {tp} tensor-parallel ranks, {4 // (pp * tp)} data-parallel ranks"
            runs.append(replace(run, name=f"pp{pp}tp{tp}dp{4 // (pp * tp)}-{dtype}{suffix}", about=about))
    uneven = "tensor-parallel shards of different sizes"
    runs.append(Run("pp1tp2dp2-fp32-uneven", 1, "fp32", 4, uneven, tp=2, variant="uneven"))
    runs.append(Run("pp1tp2dp1-bf16", 1, "bf16", 2, "tensor parallel only", tp=2))
    runs.append(Run("pp1tp3dp1-fp32", 1, "fp32", 3, "tensor parallel only, three ranks", tp=3))
    runs.append(Run("pp1tp2dp2-fp32-z2", 2, "fp32", 4, "tensor parallel under ZeRO-2", tp=2))
    legacy = "metadata of version 0.3: equal sub-parameters given as a count"
    runs.append(Run("pp1tp2dp2-bf16-legacy", 1, "bf16", 4, legacy, tp=2, variant="legacy"))
    return runs


RUNS: dict[str, Run] = {run.name: run for run in (*_plain(), *_special(), *_parallel())}


def launches() -> dict[str, list[Run]]:
    """Launch -> its runs, in the order of the table."""
    found: dict[str, list[Run]] = {}
    for run in RUNS.values():
        found.setdefault(run.launch, []).append(run)
    return found
