"""A network that is thinner between racks: what it costs, and which plans it changes."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.spec import AxisBounds
from orchestrator.core.types import MeasuredPlan, NodeCapacity
from orchestrator.planner import Calibration, Planned, learn, plan
from orchestrator.planner.cost import TimeTerms, time_terms
from orchestrator.planner.frontier import _unsharded
from orchestrator.planner.hardware import CATALOGUE, Machine
from orchestrator.planner.judge import judge
from orchestrator.planner.legality import legal
from orchestrator.planner.links import link, rack_link
from orchestrator.planner.numbers import Numbers
from orchestrator.planner.pool import pools, usable
from orchestrator.planner.space import Space, candidates, length
from tests.unit.planner.jobs import EXAMPLE, LLAMA_8B, LLAMA_70B, LLAMA_405B, job, nodes, planned
from tests.unit.planner.test_models import plans

H100 = Machine.of(replace(CATALOGUE["h100"], latency_s=0.0), 8)
RACKS = replace(H100, rack=128, oversubscription=8.0)
"""Sixteen nodes in a rack."""
EXPERTS = replace(LLAMA_8B, experts=64, experts_per_token=4, expert_hidden=2048)


def neighbours(capacity: list[NodeCapacity], size: int) -> list[NodeCapacity]:
    """So many nodes in a row in one rack."""
    return [replace(node, rack=f"rack-{at // size}") for at, node in enumerate(capacity)]


def terms(machine: Machine = RACKS, model: object = LLAMA_8B, **choices: int) -> TimeTerms:
    return time_terms(model, machine, plans(model, **choices), Numbers())  # type: ignore[arg-type]


def slower(name: str, **choices: int) -> float:
    """How many times as long a term takes as on a network that is as good between racks."""
    model = EXPERTS if "ep" in choices else LLAMA_8B
    return float(getattr(terms(RACKS, model, **choices), name)[0] / getattr(terms(H100, model, **choices), name)[0])


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize(
    ("span", "stride", "times"),
    [
        (8, 1, 1),  # inside a node
        (128, 1, 1),  # inside a rack
        (128, 64, 1),
        (256, 1, 1),  # one ring for the whole rack: what leaves it has all of the rack's way out
        (256, 8, 1),  # eight rings, sixteen members of each in a rack
        (256, 16, 1),
        (256, 32, 2),
        (256, 64, 4),
        (256, 128, 8),  # every device sends to another rack
        (4096, 1024, 8),
    ],
)
def test_groups_share_the_way_out_of_a_rack(span: int, stride: int, times: float) -> None:
    plain, thinner = (float(link(one, np.array([span]), stride)[0]) for one in (H100, RACKS))
    assert plain / thinner == times


def test_what_lies_in_one_rack_is_not_slowed() -> None:
    inside = {"dp_shard": 4, "dp_replicate": 2, "pp": 2, "tp": 8, "micro_batches": 4}
    assert terms(RACKS, **inside) == terms(H100, **inside)
    assert rack_link(RACKS, np.array([128, 129]), 1)[0] == inf  # type: ignore[index]
    assert rack_link(H100, np.array([1 << 20]), 1) == inf


def test_only_what_crosses_racks_is_slowed() -> None:
    """Sixteen shards fill a rack, eight copies are in eight racks: their average alone crosses."""
    across = {"dp_shard": 16, "dp_replicate": 8, "tp": 8, "micro_batches": 1}
    assert slower("data", **across) > 1
    for name in ("compute", "tensor", "optimizer"):
        assert slower(name, **across) == 1
    assert slower("data", dp_shard=16, tp=8, pp=8, micro_batches=8) == 1, "data-parallel groups inside racks"


def test_stages_send_through_what_their_devices_share() -> None:
    """Of stages of a rack's size every device sends to another rack, of those of half a rack every other one."""
    wanted = {"tp": 8, "micro_batches": 8}
    assert slower("pipeline", pp=4, dp_shard=16, **wanted) == pytest.approx(8)
    assert slower("pipeline", pp=4, dp_shard=8, **wanted) == pytest.approx(4)
    assert slower("pipeline", pp=2, dp_shard=8, **wanted) == 1, "both stages in one rack"
    assert slower("pipeline", pp=4, dp_shard=64, **wanted) == pytest.approx(8)


def test_tokens_pay_for_experts_in_other_racks() -> None:
    assert slower("expert", ep=32, dp_shard=64) == slower("expert", ep=16, dp_shard=64, tp=8) == 1
    assert slower("expert", ep=32, dp_shard=64, tp=8) > 2
    one_rack, two_racks = (replace(RACKS, rack=rack) for rack in (64, 32))
    found = [float(terms(one, EXPERTS, ep=64, dp_shard=64).expert[0]) for one in (one_rack, two_racks)]
    assert found[0] == terms(H100, EXPERTS, ep=64, dp_shard=64).expert[0]
    assert found[1] / found[0] > 2


@given(
    st.integers(1, 4096), st.integers(1, 512), st.integers(0, 64), st.floats(1, 64), st.integers(1, 9), st.floats(1, 4)
)
def test_a_longer_or_sparser_group_and_a_thinner_network_are_never_faster(
    span: int, stride: int, rack: int, thinner: float, more: int, times: float
) -> None:
    machine = replace(H100, rack=8 * rack, oversubscription=thinner)
    usual = link(machine, np.array([span]), stride)[0]
    assert link(machine, np.array([span * more]), stride)[0] <= usual
    assert link(machine, np.array([span]), stride * more)[0] <= usual
    assert link(replace(machine, oversubscription=thinner * times), np.array([span]), stride)[0] <= usual
    assert usual <= link(H100, np.array([span]), stride)[0]


def test_more_replicas_never_take_less_than_the_bound_that_the_search_prunes_by() -> None:
    spec = job(LLAMA_70B, global_batch=64, rack_oversubscription=8.0)
    (pool,) = pools(spec, usable(spec, neighbours(nodes(16, 8, "h100"), 2)))
    space, weigher = Space(spec, pool, legal(spec, pool.devices)), judge(spec, pool)
    rows = space.recomputations(space.even_splits(space.micro_batches(space.loads(space.shapes()))))
    bound = weigher.at_least(*_unsharded(rows))
    every = space.replicas(rows | {"row": np.arange(length(rows))})
    assert length(every) > length(rows)
    terms = weigher.where_seconds(candidates(every))
    rest = sum(seconds for name, seconds in terms.items() if name not in ("data", "optimizer"))
    assert (bound[every["row"]] <= rest * (1 + 1e-9)).all()


# ---------------------------------------------------------------- plans


def test_pipelines_go_across_racks_and_data_parallel_groups_inside_where_that_is_faster() -> None:
    """Llama 3 70B on sixteen nodes, two in a rack: shards over all; thinner, a stage of the pipeline in each rack."""
    capacity = neighbours(nodes(16, 8, "h100"), 2)
    spec = job(LLAMA_70B, global_batch=128)
    found = {thin: planned(replace(spec, rack_oversubscription=thin), capacity) for thin in (1.0, 16.0)}
    assert found[1.0].plan.mesh.pp == 1
    mesh = found[16.0].plan.mesh
    assert mesh.pp == 8 and mesh.world_size // mesh.pp == 16
    rack = {node.node: node.rack for node in capacity}
    stages = [found[16.0].assignment.nodes[at : at + 2] for at in range(0, 16, 2)]
    assert all(rack[one.node] == rack[other.node] for one, other in stages)
    # The mesh that was best without is estimated slower than the one taken.
    kept = replace(spec, rack_oversubscription=16.0)
    free = {axis: AxisBounds(size, size) for axis, size in (("pp", 1), ("tp", 4))}
    assert planned(replace(kept, parallelism=free), capacity).plan.step_s > 1.05 * found[16.0].plan.step_s


def test_a_thinner_network_is_never_estimated_faster() -> None:
    capacity = neighbours(nodes(12, 8, "a100"), 3)
    steps = [
        planned(job(LLAMA_8B, global_batch=96, rack_oversubscription=thin), capacity).plan.step_s
        for thin in (1.0, 1.5, 3.0, 9.0, 50.0, 1000.0)
    ]
    assert steps == sorted(steps) and steps[-1] > steps[0]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 8), st.sampled_from(["", "a", "b", "c"])), max_size=9),
    st.sampled_from([1.0, 4.0, 40.0]),
    st.randoms(use_true_random=False),
)
def test_the_order_of_nodes_does_not_matter(told: list[tuple[int, int, str]], thinner: float, random: object) -> None:
    capacity = [NodeCapacity(f"node-{name}", size, 0, "h100", rack=rack) for name, size, rack in told]
    shuffled = list(capacity)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    spec = job(EXAMPLE, max_nodes=6, rack_oversubscription=thinner)
    first = plan(spec, capacity)
    assert plan(spec, shuffled) == first
    if isinstance(first, Planned):
        left, mixed = ([node for node in nodes if node != capacity[0]] for nodes in (capacity, shuffled))
        after = plan(spec, left, first.plan, first.assignment)
        assert plan(spec, mixed, first.plan, first.assignment) == after


# ---------------------------------------------------------------- what is kept


def test_what_the_network_costs_is_not_learnt_as_slow_devices() -> None:
    spec, capacity = job(LLAMA_70B, global_batch=256, rack_oversubscription=16.0), neighbours(nodes(16, 8, "h100"), 2)
    found = planned(spec, capacity)
    measured = [MeasuredPlan(found.plan, found.assignment, "h100", found.plan.step_s)]
    size = found.plan.mesh.tp, found.plan.batch.micro_batch
    where = {node.node: node for node in capacity}
    assert learn(spec, measured, Calibration(), where).factor("h100", *size) == pytest.approx(1)
    assert learn(spec, measured, Calibration()).factor("h100", *size) > 1.05


def test_a_large_plan_keeps_data_parallel_rings_long_rather_than_stages_many() -> None:
    """Llama 3 405B on 2,048 nodes, sixteen in a rack: every device of a stage sends to the next rack, of a ring few."""
    spec, capacity = job(LLAMA_405B, global_batch=2048), neighbours(nodes(2048, 8, "h100"), 16)
    plain, thinner = planned(spec, capacity), planned(replace(spec, rack_oversubscription=16.0), capacity)
    assert thinner.plan.mesh.pp < plain.plan.mesh.pp
    assert thinner.plan.mesh.world_size == plain.plan.mesh.world_size == 16384
