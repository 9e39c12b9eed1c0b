"""One step's share of the global batch, cut into equal micro-batches, with the weights that make its gradient exact.

Data-parallel replica `r` of `R` consumes `samples[r]` of the `G` samples of a global batch; replicas may differ, slow
ones by many samples. Every replica runs the same number of micro-batches, so that collectives pair up, each as large as
its own samples need; rows it lacks are padding of weight zero. With per-sample losses `l_i` and weights `w_i` (1, or 0
for padding) a replica calls backward on

    loss = sum_i w_i * l_i * R / G        (`MicroBatch.loss`)

FSDP, HSDP and DDP average gradients over the `R` replicas, `1/R * sum_r grad(loss_r)`, which is then exactly the
gradient of the mean over the global batch, `1/G * sum_i grad(l_i)`, however unevenly the samples are divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from orchestrator.core.errors import InvalidInput

Collate = Callable[[list[Any]], Any]


class Dataset(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Collated rows on the session's device; `weights` is 1.0 per sample and 0.0 per padding row."""

    data: Any
    """What `collate` made of the rows; for a dataset of (input, target) pairs a pair of stacked tensors."""
    weights: torch.Tensor
    samples: tuple[int, ...]
    """Dataset index of every row (a padding row repeats a sample of the batch)."""
    scale: float
    """`R / G` of the module's formula."""

    def loss(self, per_sample: torch.Tensor) -> torch.Tensor:
        """Scalar to call backward on, from the losses of the rows (shape `(rows,)`): `sum_i w_i l_i R / G`."""
        return (per_sample * self.weights).sum() * self.scale


@dataclass(frozen=True, slots=True)
class Batch:
    """The share of one data-parallel replica in the global batch of one step."""

    step: int
    """0-based: the number of steps completed before this one."""
    samples: tuple[int, ...]
    """Dataset indices that this replica consumes, in order."""
    scale: float
    dataset: Dataset = field(repr=False)
    device: torch.device
    micro_batch: int
    """Rows per micro-batch."""
    micro_batch_count: int
    padding: int
    """Dataset index that fills the rows beyond `samples`."""
    collate: Collate = field(repr=False)

    @property
    def rows(self) -> tuple[int, ...]:
        """Dataset index of every row: the samples, then padding up to whole micro-batches."""
        missing = self.micro_batch * self.micro_batch_count - len(self.samples)
        return self.samples + (self.padding,) * missing

    def micro_batches(self) -> Iterator[MicroBatch]:
        """The rows in micro-batches of `micro_batch` rows each; loaded one after the other."""
        rows = self.rows
        for start in range(0, len(rows), self.micro_batch):
            chosen = rows[start : start + self.micro_batch]
            real = min(max(len(self.samples) - start, 0), len(chosen))
            weights = torch.zeros(len(chosen), device=self.device)
            weights[:real] = 1.0
            yield MicroBatch(self._load(chosen), weights, chosen, self.scale)

    def inputs(self) -> torch.Tensor:
        """All rows' inputs, for a pipeline schedule that cuts micro-batches itself (datasets of pairs)."""
        return self._pairs()[0]

    def targets(self, ignore_index: int = -100) -> torch.Tensor:
        """All rows' targets for a pipeline schedule; padding rows hold `ignore_index` throughout.

        The schedule's loss function must leave `ignore_index` out, sum the per-sample means of its rows and multiply by
        `scale`; construct the schedule with `scale_grads=False`.
        """
        targets = self._pairs()[1]
        targets[len(self.samples) :] = ignore_index
        return targets

    def _load(self, rows: Sequence[int]) -> Any:
        return to_device(self.collate([self.dataset[index] for index in rows]), self.device)

    def _pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        data = self._load(self.rows)
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise InvalidInput(
                f"batch.inputs() and batch.targets() need a dataset of (input, target) pairs, but its samples collate "
                f"to {type(data).__name__}: return pairs from the dataset or use batch.micro_batches()"
            )
        return data[0], data[1]


def stack(samples: list[Any]) -> Any:
    """Default collation: stacks tensors, numbers become tensors; tuples, lists and dicts are collated by entry."""
    first = samples[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(samples)
    if isinstance(first, dict):
        return {key: stack([sample[key] for sample in samples]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(stack(list(entries)) for entries in zip(*samples, strict=True))
    return torch.as_tensor(samples)


def to_device(data: Any, device: torch.device) -> Any:
    """`data` with every tensor in it on `device`."""
    if isinstance(data, torch.Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, dict):
        return {key: to_device(value, device) for key, value in data.items()}
    if isinstance(data, tuple | list):
        return type(data)(to_device(value, device) for value in data)
    return data
