"""The sample stream: a bijection per epoch, and every sample exactly once however the job is resized."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.types import BatchSplit
from orchestrator.trainer.sampler import Permutation, Sampler


def even_split(global_batch: int, replicas: int) -> BatchSplit:
    each, left = divmod(global_batch, replicas)
    samples = tuple(each + (replica < left) for replica in range(replicas))
    return BatchSplit(global_batch, max(samples), 1, samples)


@settings(deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(), epoch=st.integers(0, 10**9))
def test_a_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    elements = Permutation(size, seed, epoch)(np.arange(size))
    assert sorted(elements.tolist()) == list(range(size))


def test_one_element_of_a_huge_permutation_is_found_without_building_it() -> None:
    size = 10**15
    permutation = Permutation(size, seed=1, epoch=0)
    elements = permutation(np.array([0, 1, size - 1]))
    assert len(set(elements.tolist())) == 3
    assert all(0 <= element < size for element in elements)


def test_seeds_and_epochs_give_different_orders_and_no_order_is_the_identity() -> None:
    orders = {tuple(Permutation(100, seed, epoch)(np.arange(100)).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(range(100)) not in orders


def test_neighbours_are_scattered() -> None:
    """A weak cipher would keep differences; the mean distance of a random permutation is a third of the range."""
    elements = Permutation(4096, seed=3, epoch=0)(np.arange(4096))
    assert 0.3 < np.abs(np.diff(elements)).mean() / 4096 < 0.37


def test_an_empty_dataset_has_no_order() -> None:
    with pytest.raises(ValueError, match="at least one element"):
        Permutation(0, seed=0, epoch=0)


@settings(deadline=None)
@given(
    size=st.integers(1, 50),
    global_batch=st.integers(1, 20),
    seed=st.integers(0, 2**63),
    replicas=st.lists(st.integers(1, 20), min_size=1, max_size=12),
)
def test_every_sample_comes_exactly_once_per_epoch_however_the_job_is_resized(
    size: int, global_batch: int, seed: int, replicas: list[int]
) -> None:
    """Step n runs under replicas[n] replicas; together the steps read the stream without a gap or a repetition."""
    sampler = Sampler(size, global_batch, seed)
    stream: list[int] = []
    for step, count in enumerate(replicas):
        split = even_split(global_batch, min(count, global_batch))
        for replica in range(len(split.samples)):
            stream += sampler.replica(step, split, replica)
    whole_epochs, rest = divmod(len(stream), size)
    for epoch in range(whole_epochs):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert max(Counter(stream[whole_epochs * size :]).values(), default=1) == 1
    assert len(stream) == len(replicas) * global_batch == whole_epochs * size + rest


@settings(deadline=None)
@given(step=st.integers(0, 10**6), replicas=st.integers(1, 7))
def test_a_global_batch_is_the_same_under_every_split(step: int, replicas: int) -> None:
    sampler = Sampler(1000, 48, seed=9)
    split = even_split(48, replicas)
    together = [sample for replica in range(replicas) for sample in sampler.replica(step, split, replica)]
    assert tuple(together) == sampler.samples(step, 0, 48)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 10), (2, 21), (0.5, 5), (0, 0), (1.05, 11), (3, 31)])
def test_epochs_are_counted_in_whole_global_batches(epochs: float, steps: int) -> None:
    assert Sampler(size=105, global_batch=10, seed=0).steps(epochs) == steps
