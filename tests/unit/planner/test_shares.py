"""A slow node gets a smaller share: exactly the best there is, and never more memory than was planned for."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.types import NodeCapacity
from orchestrator.planner.pool import pools, usable
from orchestrator.planner.shares import divide, replica_speeds, split
from tests.unit.planner.jobs import EXAMPLE, LLAMA_8B, job, nodes, planned

SPEEDS = st.lists(st.sampled_from([1.0, 1.25, 1.5, 2.95]), min_size=1, max_size=4)


def slowed(capacity: list[NodeCapacity], *slow: int, speed: float = 0.5) -> list[NodeCapacity]:
    return [replace(node, speed=speed) if at in slow else node for at, node in enumerate(capacity)]


def fastest(batch: int, speeds: list[float], most: int) -> float:
    """By trying all rows; a replica without samples still runs its micro-batches of one row."""
    found = np.inf
    for rows in product(range(1, most + 1), repeat=len(speeds)):
        took = max(row / speed for row, speed in zip(rows, speeds, strict=True))
        found = min(found, -(-batch // sum(rows)) * took)
    return found


@settings(deadline=None)
@given(SPEEDS, st.integers(1, 40), st.integers(1, 5))
def test_no_other_shares_take_less_time(speeds: list[float], batch: int, most: int) -> None:
    known = sorted(set(speeds))
    counts = np.array([[speeds.count(one)] for one in known])
    found = divide(batch, counts, known, np.array([most]))
    took = found.micro_batches[0] * most / known[0] * found.relative[0]
    assert took == pytest.approx(fastest(batch, speeds, most), rel=1e-9)
    assert found.relative[0] <= 1 + 1e-9


@settings(deadline=None)
@given(SPEEDS, st.integers(4, 60), st.integers(1, 6), st.sampled_from([1, 2, 3]))
def test_all_samples_are_shared_and_no_micro_batch_is_larger(
    speeds: list[float], batch: int, most: int, multiple: int
) -> None:
    shared = split(batch, speeds, most, multiple)
    assert sum(shared.samples) == batch and min(shared.samples) >= 1
    assert max(map(shared.rows, range(len(speeds)))) <= shared.micro_batch <= most
    assert shared.micro_batches % multiple == 0
    took = max(shared.rows(at) / speed for at, speed in enumerate(speeds)) * shared.micro_batches
    alone = multiple > 1 or len(set(speeds)) == 1  # then it is as `batch.split` has it
    assert alone or took <= fastest(batch, speeds, most) * (1 + 1e-9)


def test_equal_speeds_share_equally() -> None:
    assert split(512, [1.0] * 7, 10).samples == (74, 73, 73, 73, 73, 73, 73)


def test_a_slow_node_trains_on_fewer_samples() -> None:
    spec = job(LLAMA_8B, global_batch=960, tp=8, pp=1)
    found = planned(spec, slowed(nodes(4, 8, "h100"), 1))
    assert found.plan.mesh.world_size == 32
    assert found.assignment.names[-1] == "node-2", "the slow one comes last"
    assert found.plan.batch.samples[-1] < found.plan.batch.samples[0]
    assert sum(found.plan.batch.samples) == 960
    assert "nodes of 2 speeds" in found.plan.reason
    alike = planned(spec, nodes(4, 8, "h100"))
    every_one_slow = planned(spec, slowed(nodes(4, 8, "h100"), 0, 1, 2, 3))
    without = planned(spec, nodes(3, 8, "h100"))
    assert alike.plan.step_s < found.plan.step_s < without.plan.step_s < every_one_slow.plan.step_s


def test_a_node_too_slow_to_help_is_left_out() -> None:
    found = planned(job(EXAMPLE, global_batch=60), slowed(nodes(4), 2, speed=0.02))
    assert "node-3" not in found.assignment.names and found.plan.mesh.world_size == 3


def test_devices_of_two_kinds_train_together_where_that_is_faster() -> None:
    capacity = [*nodes(4, 8, "h100"), *nodes(2, 8, "a100", first=5)]
    spec = job(LLAMA_8B, global_batch=1024)
    both, fast = planned(spec, capacity), planned(spec, capacity[:4])
    pool = next(one for one in pools(spec, usable(spec, capacity)) if one.mixed)
    assert pool.device.name == "a100" and pool.speeds == (1.0, 2.9)
    if len(both.assignment.names) > 4:
        assert both.plan.step_s < fast.plan.step_s
        speeds = replica_speeds(both.plan.mesh, both.assignment, pool)
        assert both.plan.batch.samples[speeds.index(1.0)] < both.plan.batch.samples[speeds.index(2.9)]


def test_a_pipeline_s_slow_node_slows_down_only_the_replicas_that_it_is_part_of() -> None:
    spec = job(EXAMPLE, global_batch=64, pp=2, tp=1)
    capacity = slowed(nodes(8), 3)
    found = planned(spec, capacity)
    assert found.plan.mesh.pp == 2
    pool = next(one for one in pools(spec, usable(spec, capacity)) if one.mixed)
    speeds = replica_speeds(found.plan.mesh, found.assignment, pool)
    assert speeds.count(1.0) == 1
    assert found.plan.batch.samples[speeds.index(1.0)] == min(found.plan.batch.samples)
