"""Train a small GPT on the standard library's source text, under whatever mesh the plan says.

python train.py --steps 20                       one process
torchrun --nproc-per-node 2 train.py --steps 20  two data-parallel replicas
regrow run job.yaml --nodes 4                    with an orchestrator that chooses and changes the mesh
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from data import Text, read_sources
from model import Config
from parallel import build, pipeline

from orchestrator.trainer import Batch, Session


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=10, help="steps of linear warm-up before the cosine")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    for name, value in vars(Config()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser.parse_args()


def sample_losses(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of every sample, (batch,); padding rows, whose targets are -100, count as zero."""
    losses = F.nll_loss(log_probabilities.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    return losses.view_as(targets).mean(dim=1)


def learning_rate(step: int, warmup: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def main() -> None:
    """Train."""
    args = arguments()
    config = Config(**{name: getattr(args, name) for name in vars(Config())})
    session = Session(global_batch=48)
    model = build(session, config, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: learning_rate(n, args.warmup, args.steps))
    session.track(model=model, optimizer=optimizer, scheduler=scheduler)

    pipelined = session.plan.mesh.pp > 1
    if pipelined:
        schedule = pipeline(session, model, lambda y, t: sample_losses(y, t).sum() * session.loss_scale)

    def forward_backward(batch: Batch) -> torch.Tensor | None:
        """The rank's share of the loss, as `session.step` wants it."""
        if not pipelined:
            total = torch.zeros((), device=session.device)
            for micro in batch.micro_batches():
                inputs, targets = micro.data
                loss = micro.loss(sample_losses(model(inputs), targets))
                loss.backward()
                total += loss.detach()
            return total
        losses: list[torch.Tensor] = []
        inputs = (batch.inputs(),) if model.embedding is not None else ()
        targets = batch.targets() if model.head is not None else None
        schedule.step(*inputs, target=targets, losses=losses if targets is not None else None, return_outputs=False)
        return torch.stack(losses).detach().sum() if losses else None

    for batch in session.batches(Text(read_sources(), config.seq_length), steps=args.steps):
        loss = forward_backward(batch)
        session.clip_grad_norm(1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        session.step(loss=loss)


if __name__ == "__main__":
    main()
