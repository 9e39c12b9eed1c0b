"""Whatever the job and the nodes: an answer that keeps every promise of the planner."""

from __future__ import annotations

from itertools import product

from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.core.spec import AxisBounds, JobSpec, ModelSpec
from orchestrator.core.types import Mesh, NodeCapacity, Plan
from orchestrator.planner import Infeasible, Planned, plan
from orchestrator.planner.hardware import GIB
from orchestrator.planner.legality import axis_bounds, why_not_tensor
from tests.unit.planner.jobs import job

AXES = ("pp", "dp_replicate", "dp_shard", "tp")


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 8))
    heads = kv_heads * draw(st.integers(1, 4))
    return ModelSpec(
        layers=draw(st.integers(1, 40)),
        hidden=heads * draw(st.sampled_from([8, 64])),
        heads=heads,
        kv_heads=kv_heads,
        ffn_hidden=draw(st.sampled_from([96, 688, 1024, 5000])),
        vocab=draw(st.sampled_from([256, 50257, 120000])),
        seq_length=draw(st.sampled_from([96, 128, 2048])),
        tied_embeddings=draw(st.booleans()),
    )


NARROW = ModelSpec(layers=1, hidden=8, heads=1, kv_heads=1, ffn_hidden=96, vocab=256, seq_length=96)
"""A model that neither tp nor pp divides: replicas are the only way to use devices that `dp_shard` may not."""


@st.composite
def bounds(draw: st.DrawFn) -> AxisBounds:
    least = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
    most = draw(st.sampled_from([least, least + 1, least + 6, 1_000_000]))
    prefer = draw(st.none() | st.integers(least, min(most, least + 6)))
    return AxisBounds(least, most, prefer)


@st.composite
def jobs(draw: st.DrawFn) -> JobSpec:
    axes = {axis: draw(bounds()) for axis in draw(st.sets(st.sampled_from(AXES)))}
    least = draw(st.integers(1, 4))
    batch = draw(st.integers(1, 600))
    return job(
        draw(st.none() | models()),
        global_batch=batch,
        micro_batch=draw(st.none() | st.integers(1, batch)),
        min_nodes=least,
        max_nodes=least + draw(st.integers(0, 8)),
        devices_per_node=draw(st.none() | st.integers(1, 8)),
        **axes,
    )


@st.composite
def capacities(draw: st.DrawFn) -> list[NodeCapacity]:
    names = draw(st.lists(st.integers(1, 30), unique=True, max_size=10))
    kinds = draw(st.sampled_from([["cpu"], ["h100"], ["h100", "a100"], ["cpu", "h100"], ["odd"]]))
    return [
        NodeCapacity(
            f"node-{name}",
            draw(st.integers(0, 8)),
            draw(st.sampled_from([0, 0, GIB // 4, 4 * GIB, 80 * GIB])),
            draw(st.sampled_from(kinds)),
        )
        for name in names
    ]


def check(spec: JobSpec, capacity: list[NodeCapacity], answer: Planned) -> None:
    taken, mesh, batch = answer.plan, answer.plan.mesh, answer.plan.batch
    # batch
    assert sum(batch.samples) == batch.global_batch == spec.global_batch
    assert len(batch.samples) == mesh.dp_degree
    assert min(batch.samples) >= 1
    by_kind = {node.node: node.kind for node in capacity}
    alike = len({by_kind[name] for name in answer.assignment.names}) == 1  # else the faster ones get more
    if alike:
        assert max(batch.samples) - min(batch.samples) <= 1
    assert batch.micro_batch * batch.micro_batches >= max(batch.samples)
    assert batch.micro_batch * (batch.micro_batches - 1) < max(batch.samples)  # no micro-batch of padding alone
    if spec.micro_batch is not None and not alike:
        assert batch.micro_batch <= spec.micro_batch
    elif spec.micro_batch is not None:
        assert batch.micro_batch == min(spec.micro_batch, max(batch.samples))
    elif mesh.pp > 1:
        assert batch.micro_batches >= min(mesh.pp, max(batch.samples))
    # mesh
    for axis in AXES:
        limits = axis_bounds(spec, axis)
        assert limits.min <= getattr(mesh, axis) <= limits.max
    assert mesh.cp == mesh.ep == taken.interleave == 1
    if spec.model is not None:
        assert why_not_tensor(spec.model, mesh.tp) is None
        assert sum(taken.stage_layers) == spec.model.layers
        assert len(taken.stage_layers) == mesh.pp
        assert min(taken.stage_layers) >= 1
        assert taken.step_s > 0
        assert taken.memory_bytes > 0
    # assignment
    by_name = {node.node: node for node in capacity}
    parts = answer.assignment.nodes
    assert len({part.node for part in parts}) == len(parts)
    assert spec.min_nodes <= len(parts) <= spec.max_nodes
    rank = 0
    for part in parts:
        assert part.first_rank == rank
        assert 1 <= part.devices <= min(by_name[part.node].devices, spec.devices_per_node or 8)
        rank += part.devices
        if spec.model is not None and by_name[part.node].memory_bytes:
            assert taken.memory_bytes <= by_name[part.node].memory_bytes
    assert rank == mesh.world_size == answer.assignment.world_size
    backends = {by_name[part.node].kind == "cpu" for part in parts}
    assert len(backends) == 1
    # words
    assert str(mesh) in taken.reason
    for item in answer.alternatives:
        assert item.plan.reason
        assert item.plan.mesh != mesh
        assert sum(item.plan.batch.samples) == spec.global_batch
    assert all(item.what and item.reason for item in answer.rejected)


@settings(deadline=None, max_examples=200)
@given(jobs(), capacities())
def test_a_plan_keeps_every_promise_or_there_is_a_reason(spec: JobSpec, capacity: list[NodeCapacity]) -> None:
    answer = plan(spec, capacity, None)
    if isinstance(answer, Infeasible):
        assert answer.reason
        assert answer.needs in answer.reason
        return
    check(spec, capacity, answer)


@settings(deadline=None, max_examples=50)
@given(jobs(), capacities(), st.randoms(use_true_random=False))
def test_the_order_of_nodes_does_not_matter(spec: JobSpec, capacity: list[NodeCapacity], random: object) -> None:
    shuffled = list(capacity)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan(spec, capacity, None) == plan(spec, shuffled, None) == plan(spec, capacity, None)


@settings(deadline=None, max_examples=50)
@given(jobs(), capacities(), st.data())
def test_replanning_after_losing_nodes_keeps_every_promise(
    spec: JobSpec, capacity: list[NodeCapacity], data: st.DataObject
) -> None:
    before = plan(spec, capacity, None)
    if isinstance(before, Infeasible):
        return
    left = [node for node in capacity if data.draw(st.booleans())]
    after = plan(spec, left, before.plan, before.assignment)
    if isinstance(after, Planned):
        check(spec, left, after)
        kept = [name for name in after.assignment.names if before.assignment.of(name)]
        order = [name for name in before.assignment.names if name in kept]
        if len({node.kind for node in capacity}) == 1:  # else the fastest come first
            assert kept == order == list(after.assignment.names[: len(kept)])
    same = plan(spec, capacity, before.plan, before.assignment)
    assert isinstance(same, Planned)
    assert same.plan.mesh == before.plan.mesh


def exists(spec: JobSpec, devices: int) -> bool:
    """Is any mesh legal, memory apart? By trying all."""
    for sizes in product(range(1, devices + 1), repeat=4):
        mesh = Mesh(*sizes[:3], cp=1, tp=sizes[3])
        if not spec.min_nodes <= mesh.world_size <= devices or mesh.dp_degree > spec.global_batch:
            continue
        limits = [axis_bounds(spec, axis) for axis in AXES]
        if any(not limit.min <= size <= limit.max for limit, size in zip(limits, sizes, strict=True)):
            continue
        if spec.model is None or (mesh.pp <= spec.model.layers and why_not_tensor(spec.model, mesh.tp) is None):
            return True
    return False


@settings(deadline=None, max_examples=100)
@example(
    job(None, global_batch=3, min_nodes=3, max_nodes=3, dp_shard=AxisBounds(1, 2), dp_replicate=AxisBounds(1, 9)), 3
)
@example(job(NARROW, global_batch=3, min_nodes=3, max_nodes=3, dp_shard=AxisBounds(1, 2), pp=AxisBounds(1, 1)), 3)
@given(jobs(), st.integers(1, 9))
def test_a_plan_is_found_whenever_one_exists(spec: JobSpec, devices: int) -> None:
    capacity = [NodeCapacity(f"node-{index}", 1) for index in range(devices)]
    answer = plan(spec, capacity, None)
    usable = min(devices, spec.max_nodes)
    assert isinstance(answer, Planned) == (devices >= spec.min_nodes and exists(spec, usable))


@settings(deadline=None, max_examples=20)
@given(jobs(), capacities())
def test_a_plan_that_is_kept_is_really_close(spec: JobSpec, capacity: list[NodeCapacity]) -> None:
    first = plan(spec, capacity, None)
    if isinstance(first, Infeasible):
        return
    for item in first.alternatives:
        previous: Plan = item.plan
        again = plan(spec, capacity, previous)
        assert isinstance(again, Planned)
        if again.plan.mesh == previous.mesh != first.plan.mesh and spec.model is not None:
            assert item.plan.step_s <= first.plan.step_s * 1.06
