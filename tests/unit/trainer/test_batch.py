"""A replica's micro-batches: padding of weight zero, and a loss whose mean over the replicas is the global mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.errors import InvalidInput
from orchestrator.core.types import BatchSplit
from orchestrator.trainer.batch import Batch, stack

CPU = torch.device("cpu")


class Pairs:
    """Sample i is (i, 10 * i)."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([index, index]), torch.tensor([10 * index, 10 * index])


class Numbers(Pairs):
    def __getitem__(self, index: int) -> Any:
        return float(index)


def make(samples: tuple[int, ...], scale: float = 1.0, dataset: Any = None, micro: int = 2, count: int = 2) -> Batch:
    return Batch(0, samples, scale, dataset or Pairs(), CPU, micro, count, padding=99, collate=stack)


def test_missing_rows_are_padding_of_weight_zero() -> None:
    first, second = make((5, 6, 7)).micro_batches()
    assert first.samples == (5, 6) and first.weights.tolist() == [1.0, 1.0]
    assert second.samples == (7, 99) and second.weights.tolist() == [1.0, 0.0]
    assert second.data[0].tolist() == [[7, 7], [99, 99]]


def test_a_replica_without_samples_still_runs_its_micro_batches() -> None:
    micro_batches = list(make(()).micro_batches())
    assert [micro.weights.tolist() for micro in micro_batches] == [[0.0, 0.0], [0.0, 0.0]]
    assert all(micro.loss(torch.ones(2)).item() == 0.0 for micro in micro_batches)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_the_mean_over_uneven_replicas_is_the_mean_over_the_global_batch(sizes: list[int]) -> None:
    total, replicas = sum(sizes), len(sizes)
    position, averaged = 0, 0.0
    for size in sizes:
        samples = tuple(range(position, position + size))
        position += size
        batch = make(samples, replicas / total, Numbers(), micro=2, count=3)
        averaged += sum(micro.loss(micro.data**2).item() for micro in batch.micro_batches()) / replicas
    assert averaged == pytest.approx(sum(value**2 for value in range(total)) / total, rel=1e-5)


def test_a_pipeline_gets_whole_tensors_with_the_padding_marked() -> None:
    batch = make((1, 2, 3))
    assert batch.inputs().tolist() == [[1, 1], [2, 2], [3, 3], [99, 99]]
    assert batch.targets().tolist() == [[10, 10], [20, 20], [30, 30], [-100, -100]]
    assert batch.targets(ignore_index=-1)[-1].tolist() == [-1, -1]


def test_a_pipeline_needs_pairs() -> None:
    with pytest.raises(InvalidInput, match="need a dataset of"):
        make((1,), dataset=Numbers()).inputs()


def test_collation_follows_the_structure_of_a_sample() -> None:
    samples = [{"x": torch.tensor([i]), "y": (i, float(i))} for i in range(2)]
    collated = stack(samples)
    assert collated["x"].tolist() == [[0], [1]]
    assert [part.tolist() for part in collated["y"]] == [[0, 1], [0.0, 1.0]]


def test_a_replica_with_fewer_samples_runs_smaller_micro_batches() -> None:
    """As a slow node's does: the others wait for it at each of them."""
    split = BatchSplit(16, 4, 3, (10, 5, 1, 0))
    assert [split.rows(replica) for replica in range(4)] == [4, 2, 1, 1]
    for replica, samples in enumerate(split.samples):
        batch = make(tuple(range(samples)), micro=split.rows(replica), count=split.micro_batches)
        assert [len(micro.samples) for micro in batch.micro_batches()] == [split.rows(replica)] * 3
        assert sum(micro.weights.sum().item() for micro in batch.micro_batches()) == samples
