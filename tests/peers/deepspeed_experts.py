"""Makes checkpoints of mixture-of-experts layers, and of pipelines without ZeRO, which divide the names over the ranks.

    python -m torch.distributed.run --nproc-per-node W --module tests.peers.deepspeed_experts FOLDER

writes for each case `checkpoint/` and `live.safetensors`, whose names are those of the whole model. Each rank names its
own experts from 0 on, and a pipeline stage knows its own layers only: the ranks' states are put together in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.utils import groups as process_groups
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn
from torch.nn import functional

from tests.peers.deepspeed_live import snapshot

WIDTH, STEPS = 6, 3
EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."
FP32_GRADIENTS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}


def configuration(stage: int, dtype: str, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2 if "pipeline" in more else 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
        "zero_optimization": {"stage": stage},
        dtype: {"enabled": True},
    } | more


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH + 1)
        self.down = nn.Linear(WIDTH + 1, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.relu(self.up(x)))


class Mixture(nn.Module):
    """Two layers of different numbers of experts, the second with a residual branch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        given = {"ep_size": size, "min_capacity": 1, "capacity_factor": 4.0}
        self.enter = nn.Linear(3, WIDTH)
        self.first = MoE(WIDTH, Expert(), num_experts=4, **given)
        self.second = MoE(WIDTH, Expert(), num_experts=8, use_residual=True, **given)
        self.leave = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for layer in (self.first, self.second):
            x = x + layer(x)[0]
        return self.leave(x).float().square().mean()


def live(engine: Any, name_of: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """The state of all ranks under the names of the universal view."""
    found = snapshot(engine)
    mine = {}
    for key, tensor in found.tensors.items():
        kind, _, name = key.partition("/")
        state, _, name = name.partition("/") if kind == "state" else ("", "", name)
        if kind != "weight":
            mine[f"{name_of(name)}.{state}" if state else name_of(name)] = tensor
    for state, numbers in found.scalars.items():
        mine |= {f"{name_of(name)}.{state}": torch.tensor(number) for name, number in numbers.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: tensor for one in reversed(everyone) for name, tensor in one.items()}


def mixture(size: int, config: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model = Mixture(size)
    with torch.no_grad():  # copies of one expert, until they are told apart
        for name, parameter in model.named_parameters():
            parameter.add_(0.01 * (dist.get_rank() % size) if EXPERTS in name else 0.0)
    groups = [
        {"params": [one for one in model.parameters() if one.ndim > 1], "weight_decay": 0.1, "name": "matrices"},
        {"params": [one for one in model.parameters() if one.ndim < 2], "weight_decay": 0.0, "name": "vectors"},
    ]
    optimizer = torch.optim.AdamW(split_params_into_different_moe_groups_for_optimizer(groups), lr=5e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    dtype = next(model.parameters()).dtype
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        engine.backward(engine(torch.randn(8, 3, generator=generator).to(dtype)))
        engine.step()

    def name_of(name: str) -> str:
        layer, _, rest = name.partition(EXPERTS)
        if not rest:
            return name
        module = engine.module.get_submodule(layer)
        rank = process_groups._get_expert_parallel_rank(module.expert_group_name)
        number, _, rest = rest.partition(".")
        return f"{layer}{EXPERTS}{rank * module.num_local_experts + int(number)}.{rest}"

    return engine, live(engine, name_of)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.gelu(self.inner(x))


def pipeline(config: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Equal layers, one of them without parameters; the first stage has fewer layers than the second."""
    torch.manual_seed(5)
    layers = [
        LayerSpec(nn.Linear, 3, WIDTH),
        LayerSpec(Branch),
        LayerSpec(nn.Tanh),
        *[LayerSpec(Branch) for _ in range(4)],
    ]
    model = PipelineModule([*layers, LayerSpec(nn.Linear, WIDTH, 2)], num_stages=2, loss_fn=functional.mse_loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    config = {key: value for key, value in config.items() if key != "pipeline"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(engine.mpu.get_data_parallel_rank())
    batches = iter(lambda: tuple(torch.randn(4, size, generator=generator).to(dtype) for size in (3, 2)), None)
    for _ in range(STEPS):
        engine.train_batch(batches)
    return engine, live(engine, lambda name: name)


def cases() -> dict[str, Callable[[], tuple[Any, dict[str, torch.Tensor]]]]:
    """Name -> what trains it. DeepSpeed keeps process groups, so that sizes of expert groups only grow."""
    found: dict[str, Callable[[], tuple[Any, dict[str, torch.Tensor]]]] = {}
    for size in (1, 2):
        for stage, dtype, more in ((0, "fp32", {}), (0, "bf16", {}), (1, "fp32", {}), (2, "bf16", {}),
                                   (1, "bf16", FP32_GRADIENTS)):  # fmt: skip
            name = f"experts-ep{size}-z{stage}-{dtype}{'-master' if more else ''}"
            config = configuration(stage, dtype, **more)
            found[name] = lambda size=size, config=config: mixture(size, config)  # type: ignore[misc]
    for dtype in ("fp32", "fp16"):
        config = configuration(0, dtype, pipeline=True)
        found[f"pipeline-z0-{dtype}"] = lambda config=config: pipeline(config)  # type: ignore[misc]
    return found


def main() -> None:
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo")
    for name, make in cases().items():
        home = Path(sys.argv[1]) / name
        home.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        print(f"== {name}", flush=True)
        engine, tensors = make()
        engine.save_checkpoint(str(home / "checkpoint"), tag="step")
        if dist.get_rank() == 0:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, home / "live.safetensors")
        dist.barrier()
        process_groups.mpu = None
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
