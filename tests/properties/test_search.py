"""The search against trying everything: on small clusters no plan is faster, and what it answers is legal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.spec import AxisBounds, JobSpec, ModelSpec
from orchestrator.core.types import NodeCapacity
from orchestrator.planner import Infeasible, frontier, plan
from orchestrator.planner.candidates import Candidates
from orchestrator.planner.frontier import Ranking, Wish
from orchestrator.planner.hardware import GIB
from orchestrator.planner.judge import judge
from orchestrator.planner.legality import axis_bounds, legal, why_not_tensor
from orchestrator.planner.pool import pools, usable
from orchestrator.planner.space import Space, candidates
from orchestrator.planner.transformer import layer_flops, output_flops
from tests.unit.planner.jobs import job

FIELDS = (
    *("pp", "interleave", "dp_replicate", "dp_shard", "cp", "tp", "ep", "zero", "micro_batch", "micro_batches"),
    *("recomputation", "layers_first", "layers_middle", "layers_last"),
)
FEW_SHARDS = 8


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * draw(st.integers(1, 2))
    experts = draw(st.sampled_from([0, 0, 4]))
    return ModelSpec(
        layers=draw(st.integers(1, 7)),
        hidden=heads * draw(st.sampled_from([64, 512])),
        heads=heads,
        kv_heads=kv_heads,
        ffn_hidden=draw(st.sampled_from([96, 4096])),
        vocab=draw(st.sampled_from([256, 50304, 128256])),
        seq_length=draw(st.sampled_from([96, 1024])),
        tied_embeddings=draw(st.booleans()),
        experts=experts,
        experts_per_token=2 if experts else 0,
        expert_hidden=512 if experts else 0,
    )


@st.composite
def jobs(draw: st.DrawFn) -> JobSpec:
    model = draw(models())
    axes = {
        "cp": AxisBounds(1, draw(st.sampled_from([1, 1, 3]))),
        "ep": AxisBounds(1, draw(st.sampled_from([1, 4]) if model.experts else st.just(1))),
    }
    if draw(st.booleans()):
        axes["dp_replicate"] = AxisBounds(1, draw(st.integers(1, 4)))
    if draw(st.booleans()):
        least = draw(st.integers(1, 2))
        axes["tp"] = AxisBounds(least, 8)
    batch = draw(st.integers(1, 14))
    return job(
        model,
        global_batch=batch,
        micro_batch=draw(st.none() | st.none() | st.integers(1, batch)),
        min_nodes=draw(st.integers(1, 2)),
        interleave=AxisBounds(1, draw(st.sampled_from([1, 1, 2]))),
        zero=AxisBounds(draw(st.sampled_from([1, 2, 3])), 3),
        rack_oversubscription=draw(st.sampled_from([1.0, 4.0])),
        **axes,
    )


@st.composite
def clusters(draw: st.DrawFn) -> list[NodeCapacity]:
    kind = draw(st.sampled_from(["cpu", "h100"]))
    memory = draw(st.sampled_from([0, GIB, 2 * GIB, 4 * GIB, 80 * GIB]))
    size = draw(st.sampled_from([1, 2, 4]))
    number, rack = draw(st.integers(1, 6 // size + 1)), draw(st.sampled_from([1, 2]))
    return [NodeCapacity(f"node-{at}", size, memory, kind, rack=f"rack-{at // rack}") for at in range(number)]


def stages(layers: int, pp: int) -> Iterator[tuple[int, int, int]]:
    """(first, fullest middle, last) of every way to give each of `pp` stages at least one layer."""
    found = set()
    if pp == 1:
        found.add((layers, 0, 0))
    for inner in product(range(1, layers + 1), repeat=pp - 1):
        last = layers - sum(inner)
        if pp > 1 and last >= 1:
            found.add((inner[0], max(inner[1:], default=0), last))
    yield from found


def everything(spec: JobSpec, capacity: list[NodeCapacity], faster: float = 1.0) -> Iterator[dict[str, int]]:
    """Every legal plan on nodes that are all alike but for their speed, one by one; some are `faster` than others."""
    model = spec.model
    assert model is not None
    size, devices = capacity[0].devices, sum(node.devices for node in capacity)
    free = capacity[0].kind == "cpu"
    axes = range(1, devices + 1)
    for pp, dp_replicate, dp_shard, cp, tp in product(axes, repeat=5):
        mesh = {"pp": pp, "dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp}
        world, replicas = pp * dp_replicate * dp_shard * cp * tp, dp_replicate * dp_shard
        inside = free or (axis_bounds(spec, "tp").min > 1 and tp > size)
        room = devices if inside else len(capacity) * (size // tp * tp)
        if world > room or world < spec.min_nodes * (1 if inside else tp) or replicas > spec.global_batch:
            continue
        if any(not axis_bounds(spec, axis).min <= at <= axis_bounds(spec, axis).max for axis, at in mesh.items()):
            continue
        if pp > model.layers or why_not_tensor(model, tp) or model.seq_length % (cp * tp):
            continue
        if "dp_replicate" not in spec.parallelism and dp_replicate > 1 and dp_shard < FEW_SHARDS:
            continue
        yield from runs(spec, model, mesh, faster)


def runs(spec: JobSpec, model: ModelSpec, mesh: dict[str, int], faster: float) -> Iterator[dict[str, int]]:
    """Every way to run one mesh; of several speeds, the fastest may take more than an equal share, and any layers."""
    pp = mesh["pp"]
    samples = -(-spec.global_batch // (mesh["dp_replicate"] * mesh["dp_shard"]))
    fullest = -(-model.layers // pp) + 1 + -(-output_flops(model) // layer_flops(model))
    fullest = fullest if faster == 1 else model.layers
    groups = mesh["dp_shard"] * mesh["cp"] * mesh["tp"]
    for micro_batch in [spec.micro_batch] if spec.micro_batch else range(1, ceil(samples * faster) + 1):
        micro_batch = min(micro_batch, ceil(samples * faster))
        number = -(-samples // micro_batch)
        if pp > 1 and spec.micro_batch is None and number < min(pp, samples):
            continue
        for interleave, zero, ep in product(range(1, 3), range(4), range(1, 5)):
            if interleave > spec.interleave.max or (interleave > 1 and (pp == 1 or number % pp)):
                continue
            if not spec.zero.min <= zero <= 3 or (zero < 3 and mesh["dp_shard"] * mesh["cp"] == 1):
                continue
            if ep > axis_bounds(spec, "ep").max or model.experts % ep or groups % ep:
                continue
            for split, recomputation in product(stages(model.layers, pp), range(3)):
                used = [split[0], *split[1:2] * (pp > 2), *split[2:] * (pp > 1)]
                if min(used) < interleave or max(used) > fullest or pp * interleave > model.layers:
                    continue
                chosen = (interleave, zero, ep, micro_batch, number, recomputation, *split)
                names = ("interleave", "zero", "ep", "micro_batch", "micro_batches", "recomputation", *FIELDS[-3:])
                yield mesh | dict(zip(names, chosen, strict=True))


def seconds(space: Space, plans: Candidates) -> np.ndarray:
    """Per step; infinite where a plan does not fit."""
    judged = judge(space.spec, space.pool)
    return np.where(judged.memory(plans) <= judged.limit_bytes, judged.seconds(plans), np.inf)


def rows_of(plans: list[dict[str, int]]) -> dict[str, np.ndarray]:
    return {name: np.array([one[name] for one in plans], np.int64) for name in FIELDS}


@pytest.mark.parametrize("at_once", [10**9, 0], ids=["whole", "most promising first"])
@settings(deadline=None, max_examples=120)
@given(jobs(), clusters())
def test_nothing_is_faster_than_what_the_search_finds(
    at_once: int, spec: JobSpec, capacity: list[NodeCapacity]
) -> None:
    pool = pools(spec, usable(spec, capacity))[0]
    space = Space(spec, pool, legal(spec, pool.devices))
    found = Ranking()
    if len(pool.nodes) >= spec.min_nodes:
        frontier.fastest(space, judge(spec, pool), Wish(), found, at_once)
    plans = [one for one in everything(spec, capacity) if len(capacity) >= spec.min_nodes]
    steps = seconds(space, candidates(rows_of(plans))) if plans else np.array([np.inf])
    if steps.min() == np.inf:
        assert not len(found)
        return
    assert found.step.min() == pytest.approx(steps.min(), rel=1e-12)
    largest = candidates(rows_of(plans)).devices[steps < np.inf].max()
    assert frontier.most_devices(space, judge(spec, pool), Wish()) == largest
    known = {tuple(one[name] for name in FIELDS) for one in plans}
    for at in range(len(found)):
        assert tuple(int(found.rows[name][at]) for name in FIELDS) in known
    # what is listed, too: the fastest of each of the best meshes
    best: dict[tuple[int, ...], float] = {}
    for one, step in zip(plans, steps, strict=True):
        key = tuple(one[name] for name in frontier.KEY)
        best[key] = min(best.get(key, np.inf), float(step))
    listed = np.sort(found.step[found.firsts()])[: frontier.LISTED]
    expected = sorted(step for step in best.values() if step < np.inf)[: frontier.LISTED]
    assert list(listed) == pytest.approx(expected, rel=1e-12)


@st.composite
def unlike(draw: st.DrawFn) -> tuple[JobSpec, list[NodeCapacity]]:
    """A job, often a pipeline, on nodes of several speeds."""
    spec = draw(jobs())
    assert spec.model is not None
    axes = dict(spec.parallelism)
    if draw(st.booleans()):
        axes["pp"] = AxisBounds(2, 4)
    model = replace(spec.model, layers=draw(st.integers(2, 9)))
    size, memory = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([0, GIB, 80 * GIB]))
    speeds = draw(st.lists(st.sampled_from([1.0, 1.0, 0.8, 0.5, 0.3]), min_size=2, max_size=6 // size + 1))
    kind = draw(st.sampled_from(["cpu", "h100"]))
    capacity = [NodeCapacity(f"node-{at}", size, memory, kind, speed) for at, speed in enumerate(speeds)]
    return replace(spec, model=model, parallelism=axes), capacity


@pytest.mark.parametrize("at_once", [10**9, 0], ids=["whole", "most promising first"])
@settings(deadline=None, max_examples=150)
@given(unlike())
def test_nothing_is_faster_on_nodes_of_several_speeds(at_once: int, given_: tuple[JobSpec, list[NodeCapacity]]) -> None:
    spec, capacity = given_
    for pool in pools(spec, usable(spec, capacity)):
        if not pool.mixed or len(pool.nodes) < spec.min_nodes:
            continue
        space, found = Space(spec, pool, legal(spec, pool.devices)), Ranking()
        frontier.fastest(space, judge(spec, pool), Wish(), found, at_once)
        plans = list(everything(spec, list(pool.nodes), pool.speeds[-1]))
        steps = seconds(space, candidates(rows_of(plans))) if plans else np.array([np.inf])
        if steps.min() == np.inf:
            assert not len(found)
            continue
        assert found.step.min() == pytest.approx(steps.min(), rel=1e-12)
        known = {tuple(one[name] for name in FIELDS) for one in plans}
        assert all(tuple(int(found.rows[name][at]) for name in FIELDS) in known for at in range(len(found)))


@settings(deadline=None, max_examples=60)
@given(unlike(), st.integers(0, 3), st.integers(0, 3))
def test_no_plan_takes_less_than_its_bound(given_: tuple[JobSpec, list[NodeCapacity]], fewer: int, more: int) -> None:
    spec, capacity = given_
    for pool in pools(spec, usable(spec, capacity)):
        plans = list(everything(spec, list(pool.nodes), pool.speeds[-1]))
        if not plans:
            continue
        judged, every = judge(spec, pool), candidates(rows_of(plans))
        replicas, ones = every.dp_replicate * every.dp_shard, np.ones(len(plans), np.int64)
        room = sum(node.devices for node in pool.nodes) // (every.pp * every.cp * every.tp)
        least, most = np.maximum(1, replicas - fewer), np.minimum(replicas + more, room)
        alone = replace(every, dp_replicate=ones, dp_shard=ones)
        steps = judged.seconds(every) * (1 + 1e-12)
        assert (judged.at_least(alone, (least, most)) <= steps).all()
        fullest = np.maximum(np.maximum(every.layers_first, every.layers_middle), every.layers_last)
        split = {
            "layers_first": np.where(every.pp > 2, 1, fullest),
            "layers_middle": np.where(every.pp > 2, fullest, 0),
            "layers_last": np.where(every.pp > 1, 1, 0),
        }
        assert (judged.at_least(replace(alone, **split), (least, most), False) <= steps).all()


@settings(deadline=None, max_examples=60)
@given(jobs(), clusters())
def test_plans_fit_and_give_every_device_at_most_one_rank(spec: JobSpec, capacity: list[NodeCapacity]) -> None:
    answer = plan(spec, capacity)
    if isinstance(answer, Infeasible):
        assert answer.needs in answer.reason
        return
    taken, mesh, model = answer.plan, answer.plan.mesh, spec.model
    assert model is not None
    room = {node.node: node.devices for node in capacity}
    ranks = [rank for part in answer.assignment for rank in range(part.first_rank, part.first_rank + part.devices)]
    assert ranks == list(range(mesh.world_size))
    assert all(part.devices <= room[part.node] for part in answer.assignment)
    assert sum(taken.batch.samples) == spec.global_batch
    assert len(taken.stage_layers) == mesh.pp
    assert sum(taken.stage_layers) == model.layers
    assert min(taken.stage_layers) >= taken.interleave
    assert capacity[0].memory_bytes == 0 or taken.memory_bytes <= capacity[0].memory_bytes
    assert (model.experts or 1) % mesh.ep == 0
    if capacity[0].kind != "cpu" and axis_bounds(spec, "tp").min == 1:
        assert all(part.first_rank % mesh.tp == part.devices % mesh.tp == 0 for part in answer.assignment)


@settings(deadline=None, max_examples=300)
@given(unlike())
def test_plans_on_nodes_of_several_speeds_keep_every_promise(given_: tuple[JobSpec, list[NodeCapacity]]) -> None:
    spec, capacity = given_
    answer = plan(spec, capacity)
    if isinstance(answer, Infeasible):
        return
    taken, mesh, batch = answer.plan, answer.plan.mesh, answer.plan.batch
    ranks = [rank for part in answer.assignment for rank in range(part.first_rank, part.first_rank + part.devices)]
    assert ranks == list(range(mesh.world_size))
    assert all(part.devices <= capacity[0].devices for part in answer.assignment)
    assert sum(batch.samples) == spec.global_batch and min(batch.samples) >= 1
    assert len(batch.samples) == mesh.dp_degree
    assert max(map(batch.rows, range(mesh.dp_degree))) <= batch.micro_batch
    assert spec.model is not None and sum(taken.stage_layers) == spec.model.layers
    assert len(taken.stage_layers) == mesh.pp and min(taken.stage_layers) >= taken.interleave
    assert capacity[0].memory_bytes == 0 or taken.memory_bytes <= capacity[0].memory_bytes
    if "on the slower nodes" in taken.reason:
        speed = {node.node: node.speed for node in capacity}
        of_ranks = np.concatenate([np.full(part.devices, speed[part.node]) for part in answer.assignment])
        of_stages = of_ranks.reshape(mesh.pp, -1).min(axis=1)
        slow_first = "the first stage" in taken.reason
        assert of_stages[0 if slow_first else -1] == of_stages.min() < of_stages.max()
        assert max(batch.samples) - min(batch.samples) <= 1
