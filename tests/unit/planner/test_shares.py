"""A slow node gets a smaller share: exactly the best there is, and never more memory than was planned for."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.spec import AxisBounds, ModelSpec
from orchestrator.core.types import Mesh, NodeCapacity
from orchestrator.planner.assign import assign
from orchestrator.planner.candidates import Candidates
from orchestrator.planner.cost import time_terms
from orchestrator.planner.judge import judge
from orchestrator.planner.numbers import Numbers
from orchestrator.planner.pool import pools, usable
from orchestrator.planner.shares import divide, most_speed, replica_speeds, replicas_of, split, stages_of
from orchestrator.planner.space import stage_layers, stage_splits
from tests.unit.planner.jobs import EXAMPLE, LLAMA_8B, LLAMA_70B, LLAMA_405B, job, nodes, planned

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


def took(batch: int, speeds: list[float], most: int) -> float:
    known = sorted(set(speeds))
    counts = np.array([[speeds.count(one)] for one in known])
    found = divide(batch, counts, known, np.array([most]))
    assert found.rows[-1, 0] == most
    return float(found.micro_batches[0] * most / found.speed[0])


@settings(deadline=None)
@given(SPEEDS, st.integers(1, 40), st.integers(1, 5))
def test_no_other_shares_take_less_time(speeds: list[float], batch: int, most: int) -> None:
    best = min(took(batch, speeds, one) for one in range(1, most + 1))
    within = [one for one in range(1, most + 1) if ceil(one / min(speeds) * max(speeds)) <= most]
    assert best >= fastest(batch, speeds, most) - 1e-9
    assert best <= min((fastest(batch, speeds, one) for one in within), default=np.inf) * (1 + 1e-9)


@settings(deadline=None)
@given(SPEEDS, st.integers(4, 60), st.integers(1, 6), st.sampled_from([1, 2, 3]))
def test_all_samples_are_shared_and_no_micro_batch_is_larger(
    speeds: list[float], batch: int, most: int, multiple: int
) -> None:
    shared = split(batch, speeds, most, multiple)
    assert sum(shared.samples) == batch and min(shared.samples) >= 1
    assert max(map(shared.rows, range(len(speeds)))) <= shared.micro_batch <= most
    assert shared.micro_batches % multiple == 0
    longest = max(shared.rows(at) / speed for at, speed in enumerate(speeds)) * shared.micro_batches
    alone = multiple > 1 or len(set(speeds)) == 1  # then it is as `batch.split` has it
    assert alone or longest <= took(batch, speeds, most) * (1 + 1e-9)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.25, 0.5, 0.8, 1.0]), min_size=1, max_size=14), st.integers(1, 3), st.integers(1, 2),
    st.integers(1, 14), st.integers(0, 5),
)  # fmt: skip
def test_no_number_of_replicas_is_faster_together(speeds: list[float], pp: int, tp: int, least: int, more: int) -> None:
    capacity = [replace(node, speed=speed) for node, speed in zip(nodes(len(speeds)), speeds, strict=True)]
    pool = max(pools(job(), usable(job(), capacity)), key=lambda one: len(one.nodes))
    room = len(speeds) // (pp * tp)
    if least > room:
        return
    most = min(least + more, room)

    def together(replicas: int) -> float:
        plans = Candidates(*np.ones((14, 1), np.int64))
        plans = replace(plans, pp=plans.pp * pp, tp=plans.tp * tp, dp_shard=plans.dp_shard * replicas)
        return float((replicas_of(pool, plans)[:, 0] * np.array(pool.speeds)).sum())

    one = Candidates(*np.ones((14, 1), np.int64))
    one = replace(one, pp=one.pp * pp, tp=one.tp * tp)
    found = most_speed(pool, one, np.array([least]), np.array([most]))[0]
    assert found == pytest.approx(max(map(together, range(least, most + 1))))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0.5, 0.8, 1.0])), min_size=1, max_size=7),
    st.integers(1, 7), st.integers(1, 3), st.integers(1, 28),
)  # fmt: skip
def test_ranks_lie_on_the_nodes_that_were_counted(
    sizes: list[tuple[int, float]], limit: int, pp: int, replicas: int
) -> None:
    capacity = [NodeCapacity(f"node-{at}", size, speed=speed) for at, (size, speed) in enumerate(sizes)]
    spec = job(max_nodes=limit)
    pool = max(pools(spec, usable(spec, capacity)), key=lambda one: len(one.nodes))
    if pp * replicas > pool.devices:
        return
    mesh = Mesh(pp=pp, dp_shard=replicas)
    assigned = assign(pool, mesh, 1, None)
    assert len(assigned.names) <= limit
    plans = Candidates(*np.ones((14, 1), np.int64))
    plans = replace(plans, pp=plans.pp * pp, dp_shard=plans.dp_shard * replicas)
    counted = [speed for speed, count in zip(pool.speeds, replicas_of(pool, plans)[:, 0], strict=True)
               for _ in range(count)]  # fmt: skip
    assert sorted(replica_speeds(mesh, assigned, pool)) == counted


def test_equal_shares_are_taken_where_they_need_fewer_micro_batches() -> None:
    """Of at most two rows: 1+1+1+2 of them need two passes, 2+2+2+2 one, and each pass has its collectives."""
    model = ModelSpec(layers=2, hidden=128, heads=2, kv_heads=2, ffn_hidden=96, vocab=50304, seq_length=96)
    spec = job(model, global_batch=7, micro_batch=2, pp=1, tp=2, dp_shard=4)
    speeds = enumerate((1.0, 0.8, 0.5, 0.5), 1)
    found = planned(spec, [NodeCapacity(f"node-{at}", 2, kind="cpu", speed=speed) for at, speed in speeds])
    assert sorted(found.plan.batch.samples) == [1, 2, 2, 2]
    assert found.plan.batch.micro_batches == 1
    assert "equal shares, which take fewer micro-batches" in found.plan.reason


def test_a_plan_takes_as_long_whatever_it_is_judged_beside() -> None:
    capacity = slowed(nodes(2), 1, speed=1 / 1.9)
    spec = job(EXAMPLE, global_batch=4)
    pool = next(one for one in pools(spec, usable(spec, capacity)) if one.mixed)
    ones = np.ones(2, np.int64)
    both = Candidates(*(ones for _ in range(14)))
    changes = {"pp": [1, 2], "dp_shard": [2, 1], "micro_batch": [2, 2], "micro_batches": [1, 2], "zero": [3, 3]}
    layers = {"layers_first": [8, 4], "layers_middle": [0, 0], "layers_last": [0, 4], "recomputation": [0, 0]}
    both = replace(both, **{name: np.array(value) for name, value in (changes | layers).items()})
    judged = judge(spec, pool)
    for at in range(2):
        alone = both.take(slice(at, at + 1))
        assert judged.seconds(alone)[0] == judged.seconds(both)[at]
        assert judged.way(alone)[0] == judged.way(both)[at]


@pytest.mark.parametrize("slow", [0.8, 0.5, 0.25])
@pytest.mark.parametrize("model", [LLAMA_8B, LLAMA_70B])
def test_a_slow_node_that_lies_idle_changes_nothing(model: ModelSpec, slow: float) -> None:
    spec, capacity = job(model, global_batch=64, tp=8), nodes(9, 8, "h100")
    among = next(one for one in pools(spec, usable(spec, slowed(capacity, 8, speed=slow))) if one.mixed)
    alone = pools(spec, capacity[:8])[0]
    one = dict.fromkeys(("interleave", "dp_replicate", "cp", "ep"), 1) | {
        "pp": 2, "dp_shard": 4, "tp": 8, "zero": 3, "micro_batch": 1, "micro_batches": 16, "recomputation": 0,
        "layers_first": model.layers // 2, "layers_middle": 0, "layers_last": model.layers // 2,
    }  # fmt: skip
    plans = Candidates(**{name: np.array([value]) for name, value in one.items()})
    ratio = judge(spec, among).seconds(plans)[0] / judge(spec, alone).seconds(plans)[0]
    assert ratio == pytest.approx(1, abs=0.005)


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
    spec = job(LLAMA_8B, global_batch=1024, pp=1, tp=8)
    both, fast = planned(spec, capacity), planned(spec, capacity[:4])
    pool = next(one for one in pools(spec, usable(spec, capacity)) if one.mixed)
    assert pool.device.name == "a100" and pool.speeds == (1.0, 2.9)
    assert len(both.assignment.names) == 6
    assert both.plan.step_s < fast.plan.step_s
    speeds = replica_speeds(both.plan.mesh, both.assignment, pool)
    assert both.plan.batch.samples[speeds.index(1.0)] < both.plan.batch.samples[speeds.index(2.9)]


def test_slow_devices_get_a_smaller_stage_where_that_is_faster_than_smaller_shares() -> None:
    capacity = [*nodes(4, 8, "h100"), *nodes(2, 8, "a100", first=5)]
    staged = planned(job(LLAMA_8B, global_batch=1024), capacity)
    shared = planned(job(LLAMA_8B, global_batch=1024, pp=1), capacity)
    assert staged.plan.step_s < 0.95 * shared.plan.step_s
    assert staged.plan.mesh.pp > 1
    layers = staged.plan.stage_layers
    slow = layers[0] if staged.assignment.names[0] == "node-5" else layers[-1]
    assert slow < max(layers) - 3 and sum(layers) == LLAMA_8B.layers
    assert max(staged.plan.batch.samples) - min(staged.plan.batch.samples) <= 1
    assert "on the slower nodes, has" in staged.plan.reason
    assert 0.3 < staged.chosen.mfu < 0.6, "of what 32 H100 and 16 A100 can do"


@pytest.mark.parametrize("layers", [8, 11])
def test_a_very_slow_stage_leaves_nearly_all_layers_to_the_other(layers: int) -> None:
    model = replace(EXAMPLE, layers=layers)
    found = planned(job(model, global_batch=48, pp=2, dp_shard=1, tp=1), slowed(nodes(2), 0, speed=0.1))
    assert sorted(found.plan.stage_layers) == [1, layers - 1]
    assert found.assignment.names[found.plan.stage_layers.index(1)] == "node-1"


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.sampled_from([0.3, 0.5, 0.8, 1.0]), min_size=3, max_size=14), st.integers(1, 3), st.integers(2, 200),
    st.integers(1, 12), st.data(),
)  # fmt: skip
def test_no_number_of_replicas_gets_below_the_bound(
    speeds: list[float], pp: int, batch: int, micro_batch: int, data: st.DataObject
) -> None:
    """Of larger batches than those that all plans are tried for."""
    spec = job(LLAMA_8B, global_batch=batch)
    capacity = [replace(node, speed=speed) for node, speed in zip(nodes(len(speeds), 1, "h100"), speeds, strict=True)]
    pool = max(pools(spec, usable(spec, capacity)), key=lambda one: len(one.nodes))
    room = min(len(speeds) // pp, batch)
    least = data.draw(st.integers(1, room))
    most = data.draw(st.integers(least, room))
    replicas = np.arange(least, most + 1)
    one = dict.fromkeys(("interleave", "dp_replicate", "cp", "tp", "ep"), 1) | {
        "pp": pp, "zero": 3, "micro_batch": micro_batch, "recomputation": 0,
        "layers_first": 32 if pp == 1 else 10, "layers_middle": 8 * (pp > 2), "layers_last": 0 if pp == 1 else 14,
    }  # fmt: skip
    columns = {name: np.full(len(replicas), value) for name, value in one.items()}
    samples = -(-batch // replicas)
    plans = Candidates(dp_shard=replicas, micro_batches=-(-samples // micro_batch), **columns)
    ends = np.full(len(replicas), least), np.full(len(replicas), most)
    judged = judge(spec, pool)
    bound = judged.at_least(replace(plans, dp_shard=np.ones_like(replicas)), ends)
    assert (bound <= judged.seconds(plans) * (1 + 1e-12)).all()


def test_one_slow_node_of_many_is_put_where_a_stage_has_little_to_do() -> None:
    spec = job(LLAMA_405B, global_batch=256, tp=8, pp=AxisBounds(16, 16))
    capacity = nodes(32, 8, "b200")
    alike, slow = planned(spec, capacity), planned(spec, slowed(capacity, 7, speed=0.7))
    assert slow.plan.mesh.world_size == 256
    assert slow.plan.step_s < 1.1 * alike.plan.step_s, "not 1 / 0.7 times"
    assert "node-8" in (slow.assignment.names[0], slow.assignment.names[-1])


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 4), st.integers(1, 3), st.sampled_from([0.25, 0.5, 0.8]), st.booleans(), st.data())
def test_a_step_with_stages_of_several_speeds_takes_what_its_stages_take(
    pp: int, width: int, speed: float, slow_first: bool, data: st.DataObject
) -> None:
    """Against adding up one stage after the other."""
    number = data.draw(st.integers(1, width))
    capacity = slowed(nodes(pp * width, 8, "h100"), *range(number), speed=speed)
    spec = job(LLAMA_8B, global_batch=64)
    pool = next(one for one in pools(spec, usable(spec, capacity)) if one.mixed)
    layers = data.draw(st.sampled_from(stage_splits(32, pp, 1, 2, True).tolist()))
    one = dict.fromkeys(("interleave", "dp_replicate", "cp", "ep"), 1) | {
        "pp": pp, "dp_shard": width, "tp": 8, "zero": 3, "micro_batch": 1, "micro_batches": 8, "recomputation": 0,
        "layers_first": layers[0], "layers_middle": layers[1], "layers_last": layers[2],
    }  # fmt: skip
    plans = Candidates(**{name: np.array([value]) for name, value in one.items()})
    speeds = stages_of(pool, plans, slow_first)
    found = time_terms(LLAMA_8B, pool.machine, plans, Numbers(), None, speeds)
    each = [pool.speeds[-1]] * pp
    each[0 if slow_first else -1] = 1.0
    assert (speeds.first[0], speeds.last[0]) == (each[0], each[-1])
    per_layer = time_terms(LLAMA_8B, pool.machine, replace(plans, layers_first=np.array([40])), Numbers())
    computing, wait = per_layer.compute[0] / 8 / 40, per_layer.tensor[0] / 8 / 40
    logits = time_terms(LLAMA_8B, pool.machine, replace(plans, layers_last=np.array([40])), Numbers()).compute[0] / 8
    logits -= 40 * computing
    stages = stage_layers(32, pp, layers[0], layers[2])
    took = [count * (computing / at + wait) for count, at in zip(stages, each, strict=True)]
    took[-1] += logits / each[-1]
    expected = 8 * max(took) + sum(took) - max(took)
    measured = found.compute[0] + found.tensor[0] + found.bubble[0] - (pp - 1) * found.pipeline[0] / 8
    assert measured == pytest.approx(expected, rel=1e-9)


def test_a_pipeline_s_slow_node_slows_down_only_the_replicas_that_it_is_part_of() -> None:
    spec = job(EXAMPLE, global_batch=64, pp=2, tp=1)
    capacity = slowed(nodes(8), 3)
    found = planned(spec, capacity)
    assert found.plan.mesh.pp == 2
    pool = next(one for one in pools(spec, usable(spec, capacity)) if one.mixed)
    speeds = replica_speeds(found.plan.mesh, found.assignment, pool)
    assert speeds.count(1.0) == 1
    assert found.plan.batch.samples[speeds.index(1.0)] == min(found.plan.batch.samples)
