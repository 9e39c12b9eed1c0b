"""Small models of odd sizes, so that nothing divides evenly by chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.peers.cases import Run

VOCABULARY, WIDTH, HIDDEN = 47, 31, 43
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class RunningMean(nn.Module):
    """Buffers that training changes, on every rank by its own data, in any type (PyTorch's batch norm mixes none)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(x.detach().mean(0).to(self.mean.dtype), 0.3)
        self.batches += 1
        return x - self.mean.to(x.dtype)


class Net(nn.Module):
    """Matrices of prime sizes, biases, parameters of one element; more by the run's settings."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.gain = nn.Parameter(torch.ones(1))
        self.temperature = nn.Parameter(
            torch.full((1, 1), 1.5)
        )  # a scalar proper (0-d) does not survive DeepSpeed's start
        self.lift = nn.Parameter(0.1 * torch.randn(2, 3, 5))
        if run.unused:
            self.unused = nn.Linear(7, 11)
        if run.frozen:
            self.rotation = nn.Linear(WIDTH, WIDTH)
            self.rotation.requires_grad_(False)
            self.offset = nn.Parameter(torch.randn(1), requires_grad=False)
        if run.buffers:
            self.running = RunningMean()
            self.register_buffer("positions", torch.arange(13))
            self.register_buffer("scratch", torch.randn(5), persistent=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        if run.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(tokens))
        x = x + self.gain * self.down(functional.gelu(self.up(x)))
        if hasattr(self, "rotation"):
            x = x + self.rotation(x) + self.offset
        if hasattr(self, "running"):
            x = self.running(x)
        x = x * (1 + self.lift.sum())
        return functional.cross_entropy((self.head(x) / self.temperature).float(), targets)


def groups(run: Run, model: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups as (names, hyper-parameters). In three groups, the middle one has a single element."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if run.groups == 1:
        return [{"names": names}]
    matrices = [name for name in names if name.endswith("weight")]
    rest = [name for name in names if name not in (*matrices, "gain")]
    return [
        {"names": matrices, "lr": 1.1e-2, "weight_decay": 0.13},
        {"names": ["gain"], "lr": 7e-3, "weight_decay": 0.0},
        {"names": rest, "lr": 3e-3, "weight_decay": 0.01},
    ]


def optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    parameters = dict(model.named_parameters())
    given = [
        {key: value for key, value in group.items() if key != "names"}
        | {"params": [parameters[name] for name in group["names"]]}
        for group in groups(run, model)
    ]
    match run.optimizer:
        case "sgd":
            return torch.optim.SGD(given, lr=1e-2, momentum=0.9, weight_decay=0.03)
        case "rmsprop":
            return torch.optim.RMSprop(given, lr=1e-3, momentum=0.7, centered=True)
        case "adagrad":
            return torch.optim.Adagrad(given, lr=1e-2)
        case _:
            return torch.optim.AdamW(given, lr=5e-3, betas=(0.9, 0.97), weight_decay=0.1)


def batch(rank: int, step: int, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that one data-parallel rank sees in one step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(0, VOCABULARY, (2, rows), generator=generator)
    return tokens[0], tokens[1]
