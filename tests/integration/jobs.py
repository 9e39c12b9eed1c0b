"""Jobs whose ranks are forked by `tests.integration.ranks`: launch orders, their outcome, commits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator import wire
from orchestrator.checkpoint import store
from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.layout import Box
from orchestrator.core.types import (
    AssignedNode,
    Assignment,
    BatchSplit,
    Entrypoint,
    Generation,
    LaunchOrder,
    Mesh,
    Plan,
    SaveReport,
)

GLOBAL_BATCH = 16  # not a multiple of three
MODEL = ["--layers=3", "--hidden=32", "--heads=4", "--kv-heads=4", "--ffn-hidden=48", "--seq-length=8", "--warmup=2"]
"""Arguments of the example for a model that trains fast."""


class Outcome(NamedTuple):
    exit_codes: list[int]
    messages: list[tuple[int, dict[str, Any]]]
    log: str


class Ranks:
    """The warm process that forks ranks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.integration.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "REGROW_DEVICE": "cpu"},
            cwd=Path(__file__).parents[2],
        )

    def run(self, **launch: Any) -> Outcome:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(launch) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Outcome(answer["exit_codes"], [(rank, message) for rank, message in answer["messages"]], answer["log"])

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def split(mesh: Mesh, micro_batches: int) -> BatchSplit:
    """Uneven over the replicas where it must be, with as many micro-batches as pipeline stages at least."""
    each, left = divmod(GLOBAL_BATCH, mesh.dp_degree)
    samples = tuple(each + (replica < left) for replica in range(mesh.dp_degree))
    micro_batches = max(micro_batches, mesh.pp)
    return BatchSplit(GLOBAL_BATCH, -(-max(samples) // micro_batches), micro_batches, samples)


def stages(mesh: Mesh) -> tuple[int, ...]:
    return {1: (3,), 2: (2, 1), 3: (1, 1, 1)}[mesh.pp]


class Job:
    """Launch orders and ledgers of one job in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "checkpoints"
        self.root.mkdir()
        self._generations = 0

    def order(
        self, mesh: Mesh, checkpoint: str | None = None, *, save_every_steps: int | None = None, micro_batches: int = 1
    ) -> LaunchOrder:
        self._generations += 1
        assignment = Assignment((AssignedNode("node-0", 0, mesh.world_size),))
        plan = Plan(mesh, split(mesh, micro_batches), stage_layers=stages(mesh))
        return LaunchOrder(
            job="meshes",
            generation=Generation(self._generations, plan, assignment),
            entrypoint=Entrypoint("train.py"),
            checkpoint_uri=self.root.as_uri(),
            checkpoint_path=checkpoint,
            save_every_s=None,
            save_every_steps=save_every_steps,
            store=None,
            seed=7,
        )

    def ledger(self, order: LaunchOrder) -> Path:
        return self.folder / f"ledger-{order.generation.number}"

    def launch(self, ranks: Ranks, orders: list[LaunchOrder], steps: int, **more: Any) -> Outcome:
        """Train the orders one after the other in one set of ranks."""
        paths = [self.folder / f"order-{order.generation.number}.json" for order in orders]
        for path, order in zip(paths, orders, strict=True):
            path.write_text(wire.dumps(order))
        outcome = ranks.run(
            orders=[str(path) for path in paths],
            arguments=[["--steps", str(steps), *MODEL]] * len(orders),
            ledgers=[str(self.ledger(order)) for order in orders],
            **more,
        )
        assert not any(outcome.exit_codes), f"{orders[0].generation.plan.mesh}: {outcome.exit_codes}\n{outcome.log}"
        return outcome

    def commit(self, outcome: Outcome, order: LaunchOrder, step: int) -> str:
        reports = [SaveReport(**message["report"]) for _, message in outcome.messages if message["type"] == "save"]
        number, size = order.generation.number, order.generation.plan.mesh.world_size
        parts = [report for report in reports if (report.generation, report.step) == (number, step)]
        return store.commit(self.root, generation=number, step=step, world_size=size, parts=parts).path

    def weights(self, path: str) -> dict[str, NDArray[np.float32]]:
        """Parameters and moments of a checkpoint."""
        view = native.open_view(self.root, path)
        values = {name: np.empty(tensor.shape, np.float32) for name, tensor in view.tensors.items()}
        for name, array in values.items():
            view.read(name, Box.whole(array.shape), array)
        return values
