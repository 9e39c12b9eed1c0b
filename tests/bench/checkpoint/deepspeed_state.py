"""Makes the checkpoint that the benchmark converts: a real DeepSpeed run, as a torchrun worker of its environment.

145.5 million parameters in the shapes of a small GPT, bf16 with fp32 Adam: about 2 GB at ZeRO 1, 1.75 GB at ZeRO 3.
"""

from __future__ import annotations

import sys

import deepspeed
import torch
import torch.distributed as dist

LAYERS, HIDDEN, VOCABULARY = 12, 896, 20000


class Block(torch.nn.Module):
    """A layer's worth of weights; what it computes does not matter here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.qkv = torch.nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = torch.nn.Linear(HIDDEN, HIDDEN)
        self.up = torch.nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = torch.nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.out(self.qkv(self.norm(x))[..., :HIDDEN])
        return x + self.down(torch.relu(self.up(x + first)))


class Model(torch.nn.Module):
    """Embedding, blocks, output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).float().square().mean()


def main(folder: str, stage: int) -> None:
    deepspeed.comm.init_distributed(dist_backend="gloo")
    torch.manual_seed(1)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(torch.arange(4).reshape(1, 4)))
    engine.step()
    engine.save_checkpoint(folder, tag="step1")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
