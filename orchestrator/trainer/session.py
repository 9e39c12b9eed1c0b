"""The one object that a training script holds."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator import ledger
from orchestrator.checkpoint.formats import native
from orchestrator.core.errors import CheckpointError, InvalidInput
from orchestrator.core.types import Mesh
from orchestrator.trainer.agreement import Agreed, Agreement
from orchestrator.trainer.batch import Batch, Collate, Dataset, stack
from orchestrator.trainer.channel import Channel
from orchestrator.trainer.clip import clip_grad_norm
from orchestrator.trainer.layouts import Layouts
from orchestrator.trainer.restore import restore
from orchestrator.trainer.sampler import Sampler
from orchestrator.trainer.saver import Saver
from orchestrator.trainer.state import Stateful, Tracked
from orchestrator.trainer.world import choose_device, join, own_order, read_order

FLUSH_S = 10.0
"""How long a worker that is about to exit waits for the agent to take its last messages."""


class Session:
    """A worker's part in a training job: the mesh, the state to keep, the batches and the steps.

        session = Session(global_batch=48)
        model, optimizer = build(session.mesh)
        session.track(model=model, optimizer=optimizer)
        for batch in session.batches(dataset, steps=1000):
            total = 0.0
            for micro in batch.micro_batches():
                inputs, targets = micro.data
                loss = micro.loss(per_sample_loss(model(inputs), targets))
                loss.backward()
                total += loss.detach()
            session.clip_grad_norm(1.0)
            optimizer.step()
            optimizer.zero_grad()
            session.step(loss=total)

    Mesh, batch split, seed, checkpoint and saving come from the launch order of the agent that started this worker. A
    script started by hand runs without one: `mesh` (one `dp_shard` replica per process of torchrun unless given),
    `global_batch`, `micro_batch` and `seed` then apply, and nothing is restored or saved. `device` is "cpu" or "cuda";
    left out, `REGROW_DEVICE` decides, else a GPU is used where every worker has its own.

    Raises `InvalidInput` when the order cannot be read or does not fit the number of workers.
    """

    def __init__(
        self,
        *,
        global_batch: int = 1,
        micro_batch: int | None = None,
        mesh: Mesh | None = None,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        order = read_order(dict(os.environ))
        if order is None:
            sizes = mesh or Mesh(dp_shard=int(os.environ.get("WORLD_SIZE", "1")))
            order = own_order(sizes, global_batch, micro_batch, seed)
        self._order = order
        self.plan = order.generation.plan
        """Mesh, batch split, layers per pipeline stage and recomputation of this generation."""
        world = join(self.plan.mesh, choose_device(device or os.environ.get("REGROW_DEVICE")))
        self.rank = world.rank
        self.device = world.device
        self.mesh = world.mesh
        """DeviceMesh with the dimensions `pp, dp_replicate, dp_shard, cp, tp`, each maybe of size 1."""
        self.replica = self.plan.mesh.replica(self.rank)
        """Index of this rank's data-parallel replica."""
        self.completed = 0
        """Number of completed steps of the job; counts on from the restored checkpoint."""
        self._tracked: Tracked | None = None
        self._sampler: Sampler | None = None
        self._restored_sampler: dict[str, Any] = {}
        self._samples: tuple[int, ...] = ()
        self._agreement = Agreement(world.control, self.plan.mesh.dp_degree * self.plan.mesh.cp)
        self._layouts = Layouts(self.plan.mesh, self.rank)
        self._channel = self._open_channel()
        self._ledger = self._open_ledger()
        self._saver = self._open_saver()
        self._served = 0
        self._due = False
        self._finalizer = weakref.finalize(self, _leave, self._channel)

    # ------------------------------------------------------------ set-up

    def _open_channel(self) -> Channel:
        path = os.environ.get("REGROW_SOCKET")
        return Channel(Path(path) if path else None, generation=self._order.generation.number, rank=self.rank)

    def _open_ledger(self) -> ledger.Writer | None:
        directory = os.environ.get("REGROW_LEDGER")
        if not directory or not self._has_loss:
            return None
        return ledger.Writer(Path(directory), self._order.generation.number, self.rank)

    def _open_saver(self) -> Saver | None:
        if not self._order.checkpoint_uri:
            return None
        return Saver(
            self._order.checkpoint_uri,
            generation=self._order.generation.number,
            rank=self.rank,
            world_size=self.plan.mesh.world_size,
            layouts=self._layouts,
            report=self._channel.saved,
        )

    @property
    def _has_loss(self) -> bool:
        """Whether this rank owns a share of the loss: of each replica the first tp rank of the last stage."""
        position = self.plan.mesh.coordinate(self.rank)
        return position["tp"] == 0 and position["pp"] == self.plan.mesh.pp - 1

    @property
    def loss_scale(self) -> float:
        """`R / G`: weight of one sample's loss in the loss that a replica calls backward on (see `batch`)."""
        return self.plan.mesh.dp_degree / self.plan.batch.global_batch

    def track(
        self,
        *,
        model: nn.Module | Sequence[nn.Module],
        optimizer: torch.optim.Optimizer | None = None,
        **extra: Stateful,
    ) -> None:
        """Name the state that checkpoints hold, and restore it from this generation's checkpoint, if there is one.

        `model` is the sharded model, or the list of this rank's stage modules, whose parameter names must be those of
        the whole model. `extra` are objects with a JSON-able `state_dict` and a `load_state_dict`, such as a scheduler.
        Raises `CheckpointError` when the checkpoint does not fit the model.
        """
        modules = [model] if isinstance(model, nn.Module) else list(model)
        self._tracked = Tracked(modules, optimizer, extra)
        if self._order.checkpoint_path is not None:
            self._restore(self._tracked, self._order.checkpoint_path)
        self._channel.ready(self.completed)

    def _restore(self, tracked: Tracked, path: str) -> None:
        view = native.open_view(self._order.checkpoint_uri, path)
        restore(view, tracked, self._layouts)
        self.completed = view.step
        self._restored_sampler = view.state.get("sampler", {})

    # ------------------------------------------------------------ batches

    def batches(
        self,
        dataset: Dataset,
        *,
        steps: int | None = None,
        epochs: float | None = None,
        collate: Collate = stack,
    ) -> Iterator[Batch]:
        """The replica's part of every global batch, from the first step that is not done up to step `steps`, or for
        `epochs` passes over the map-style `dataset` (whole global batches), or without end.

        Call `step` once per batch. After the last one the state is saved; the generator returns when that is durable.
        """
        if self._tracked is None:
            raise InvalidInput("session.batches was called before session.track: track the model first")
        if len(dataset) == 0:
            raise InvalidInput("session.batches was given an empty dataset: give it at least one sample")
        self._sampler = Sampler(len(dataset), self.plan.batch.global_batch, self._order.seed)
        self._check_sampler(self._sampler)
        last = steps if epochs is None else min(self._sampler.steps(epochs), steps or self._sampler.steps(epochs))
        while last is None or self.completed < last:
            before = self.completed
            batch = self._batch(self._sampler, dataset, collate)
            self._samples = batch.samples
            yield batch
            if self.completed != before + 1:
                raise InvalidInput(
                    f"session.step was called {self.completed - before} times for the batch of step {before + 1}: "
                    "call it exactly once per batch"
                )
        self._finish()

    def _batch(self, sampler: Sampler, dataset: Dataset, collate: Collate) -> Batch:
        split = self.plan.batch
        return Batch(
            step=self.completed,
            samples=sampler.replica(self.completed, split, self.replica),
            scale=self.loss_scale,
            dataset=dataset,
            device=self.device,
            micro_batch=split.rows(self.replica),
            micro_batch_count=split.micro_batches,
            padding=sampler.samples(self.completed, 0, 1)[0],
            collate=collate,
        )

    def _check_sampler(self, sampler: Sampler) -> None:
        for name, value in self._restored_sampler.items():
            if value != (now := self._sampler_state(sampler)[name]):
                raise InvalidInput(
                    f"{name} of the data was {value} when the checkpoint was made and is {now} now: samples would be "
                    "lost or repeated; put it back, or start without the checkpoint"
                )

    @staticmethod
    def _sampler_state(sampler: Sampler) -> dict[str, int]:
        return {"samples": sampler.size, "global_batch": sampler.global_batch, "seed": sampler.seed}

    def generator(self, step: int, sample: int) -> torch.Generator:
        """Random numbers for one sample of one step (augmentation, dropout): the same on every rank and mesh."""
        digest = hashlib.blake2b(f"{self._order.seed}/{step}/{sample}".encode(), digest_size=8).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest, "little") >> 1)

    # ------------------------------------------------------------ steps

    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients of the tracked model so that their norm over the whole mesh is at most `max_norm`.

        Every rank must call it; costs one all-reduce of one number. Returns the norm before clipping.
        """
        if self._tracked is None:
            raise InvalidInput("session.clip_grad_norm was called before session.track: track the model first")
        return clip_grad_norm(self._tracked.parameters.values(), max_norm, self._layouts, self.device)

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """Count a step as completed; call it on every rank after the optimizer.

        `loss` is the sum of what this rank called backward on for this batch (`MicroBatch.loss`); the exact mean over
        the global batch is reported one step later. Ranks that have none, such as all but the last pipeline stage,
        leave it out. Saves when it is due or asked for; ends the process with exit code 0 when asked to pause.
        """
        self.completed += 1
        share = self._share(loss)
        if self._ledger is not None:
            first = self.plan.mesh.coordinate(self.rank)["cp"] == 0
            self._ledger.write(self.completed, self._samples if first else (), share)
        agreed = self._agreement.finish()
        self._report(agreed)
        if agreed is not None and agreed.pause:
            self._pause(share)
        self._save_if_due(agreed)
        self._start_agreement(share)
        if agreed is None and self._saver is not None and self._tracked is not None:
            self._saver.prepare(self._tracked)  # the optimizer has its states from its first step on

    def _share(self, loss: torch.Tensor | float | None) -> float | None:
        if loss is None or not self._has_loss:
            return None
        return float(loss) / (self.plan.mesh.dp_degree * self.plan.mesh.cp)

    def _start_agreement(self, share: float | None) -> None:
        request = self._channel.request
        writing = self._saver is not None and self._saver.writing
        wanted = request.number > self._served
        self._agreement.start(self.completed, share=share, save=wanted, pause=request.pause, writing=writing)

    def _report(self, agreed: Agreed | None) -> None:
        known = agreed is not None and agreed.loss is not None
        self._channel.progress(
            self.completed, agreed.loss if known and agreed else None, agreed.step if known and agreed else None
        )

    def _save_if_due(self, agreed: Agreed | None) -> None:
        """Save after this step when all ranks know that it is wanted and that none of them is still writing."""
        if self._saver is None or self._tracked is None:
            return
        every = self._order.save_every_steps
        self._due = self._due or (every is not None and self.completed % every == 0)
        wanted = self._due or (agreed is not None and agreed.save)
        if wanted and not (agreed is not None and agreed.writing):
            self._due = False
            self._save(self._saver, self._tracked)

    def _save(self, saver: Saver, tracked: Tracked) -> None:
        self._served = self._channel.request.number
        state = tracked.json_state()
        if self._sampler is not None:
            state["sampler"] = self._sampler_state(self._sampler)
        saver.save(tracked, self.completed, state)

    def _save_and_wait(self) -> None:
        """Return once the state after the last step is durable; raises `CheckpointError` when it cannot be written."""
        if self._saver is None or self._tracked is None:
            return
        self._saver.wait()
        if self._saver.last_step != self.completed:
            self._save(self._saver, self._tracked)
        if (error := self._saver.wait()) is not None:
            raise CheckpointError(f"the state after step {self.completed} could not be saved: {error}") from error

    def _pause(self, share: float | None) -> None:
        """Save, tell the agent and end this process; every rank gets here after the same step."""
        self._start_agreement(share)
        self._save_and_wait()
        self._report(self._agreement.finish())
        self._channel.paused(self.completed)
        self.close()
        raise SystemExit(0)

    def _finish(self) -> None:
        agreed = self._agreement.finish()
        if agreed is not None:
            self._report(agreed)
            self._save_and_wait()
        self._channel.flush(FLUSH_S)

    def close(self) -> None:
        """Deliver what is still to be told to the agent (also done at exit) and leave the process group."""
        self._finalizer()
        if dist.is_initialized():
            dist.destroy_process_group()


def _leave(channel: Channel) -> None:
    """At exit, maybe after an exception: must not wait for peers. (`world` leaves the group.)"""
    channel.flush(FLUSH_S)
    channel.close()
