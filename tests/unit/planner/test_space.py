"""The pieces that plans are made of."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from orchestrator.core.spec import AxisBounds, JobSpec
from orchestrator.core.types import Mesh, NodeCapacity
from orchestrator.planner.legality import legal
from orchestrator.planner.pool import pools, usable
from orchestrator.planner.space import Rows, Space, length, only, stage_layers, stage_splits, take
from tests.unit.planner.jobs import LLAMA_8B, LLAMA_70B, job, nodes


def space(spec: JobSpec, capacity: list[NodeCapacity]) -> Space:
    pool = pools(spec, usable(spec, capacity))[0]
    return Space(spec, pool, legal(spec, pool.devices))


def everything(found: Space) -> Rows:
    return found.complete(found.loads(found.shapes()))


def column(rows: Rows, *names: str) -> set[tuple[int, ...]]:
    return set(zip(*(rows[name].tolist() for name in names), strict=True))


def test_the_fullest_replica_has_each_number_of_samples_once() -> None:
    found = space(job(None, global_batch=12), nodes(12))
    loads = found.loads(found.shapes())
    # 12 samples on 1, 2, 3, 4, 5, 6 to 11, and 12 replicas: 12, 6, 4, 3, 3, 2, 1
    rows = ("samples", "least", "most")
    assert column(loads, *rows) == {(12, 1, 1), (6, 2, 2), (4, 3, 3), (3, 4, 5), (2, 6, 11), (1, 12, 12)}


def test_micro_batches_are_as_small_as_their_number_allows() -> None:
    found = space(job(None, global_batch=10, dp_shard=1), nodes(1))
    rows = found.micro_batches(found.loads(found.shapes()))
    assert column(rows, "micro_batch", "micro_batches") == {(10, 1), (5, 2), (4, 3), (3, 4), (2, 5), (1, 10)}
    fixed = space(job(None, global_batch=10, dp_shard=1, micro_batch=4), nodes(1))
    assert column(fixed.micro_batches(fixed.loads(fixed.shapes())), "micro_batch", "micro_batches") == {(4, 3)}


def test_a_pipeline_is_given_as_many_micro_batches_as_stages() -> None:
    found = space(job(global_batch=8, pp=4, tp=1, dp_shard=1), nodes(4))
    rows = found.micro_batches(found.loads(found.shapes()))
    assert column(rows, "micro_batches") == {(4,), (8,)}


def test_interleaved_stages_take_whole_rounds_of_micro_batches() -> None:
    spec = job(global_batch=12, pp=4, tp=1, dp_shard=1, interleave=AxisBounds(1, 3))
    found = space(spec, nodes(4))
    rows = found.micro_batches(found.loads(found.shapes()))
    assert column(take(rows, rows["interleave"] == 2), "micro_batches") == {(4,), (12,)}
    assert not (rows["interleave"] == 3).any()  # 4 stages of 3 chunks would need 12 layers, the example has 8


@pytest.mark.parametrize(("layers", "stages"), [(5, 3), (8, 4), (7, 5), (9, 2), (4, 4)])
def test_no_split_of_layers_is_left_out_but_dominated_ones(layers: int, stages: int) -> None:
    tried = [one for one in product(range(1, layers + 1), repeat=stages) if sum(one) == layers]
    ends = {(one[0], max(one[1:-1], default=0), one[-1]) for one in tried}
    best = {one for one in ends if not any(other != one and np.all(np.less_equal(other, one)) for other in ends)}
    assert {tuple(one) for one in stage_splits(layers, stages, 1, layers).tolist()} == best


def test_layers_of_every_stage() -> None:
    assert stage_layers(126, 1, 126, 0) == (126,)
    assert stage_layers(9, 2, 5, 4) == (5, 4)
    assert stage_layers(126, 16, 7, 7) == (7, *[8] * 14, 7)
    assert stage_layers(11, 5, 2, 2) == (2, 3, 2, 2, 2)


def test_each_number_of_replicas_is_divided_in_every_way() -> None:
    spec = job(None, global_batch=12, dp_replicate=AxisBounds(1, 12))
    rows = everything(space(spec, nodes(12)))
    pairs = {(left, right) for left, right in product(range(1, 13), repeat=2) if left * right <= 12}
    assert column(rows, "dp_replicate", "dp_shard") == pairs


def test_whole_states_are_replicated_beside_many_shards_or_on_demand() -> None:
    free = everything(space(job(None, global_batch=32), nodes(32)))
    assert column(free, "dp_replicate", "dp_shard") >= {(1, 32), (1, 2)}
    assert all(replicas == 1 for replicas, shards in column(free, "dp_replicate", "dp_shard") if shards < 8)
    bounded = space(job(None, global_batch=32, dp_shard=AxisBounds(1, 2), dp_replicate=AxisBounds(1, 8)), nodes(32))
    assert (8, 2) in column(everything(bounded), "dp_replicate", "dp_shard")


def test_tensor_groups_stay_inside_nodes_of_devices_with_fast_links() -> None:
    sizes = column(space(job(LLAMA_70B), nodes(4, 4, "h100")).shapes(), "tp")
    assert sizes == {(1,), (2,), (4,)}
    assert (8,) in column(space(job(LLAMA_70B, tp=8), nodes(4, 4, "h100")).shapes(), "tp")  # where nothing else may be
    assert (4,) in column(space(job(), nodes(4, 1, "cpu")).shapes(), "tp")  # every link is as fast


def test_experts_are_spread_over_what_shards_and_tensors_span() -> None:
    model = replace(LLAMA_8B, experts=6, experts_per_token=2, expert_hidden=4096)
    rows = everything(space(job(model, ep=AxisBounds(1, 8), global_batch=32), nodes(1, 8, "h100")))
    assert column(rows, "ep") == {(1,), (2,), (3,), (6,)}
    assert not (rows["dp_shard"] * rows["cp"] * rows["tp"] % rows["ep"]).any()


def test_zero_stages_are_those_of_the_job_and_one_where_nothing_is_sharded() -> None:
    rows = everything(space(job(zero=AxisBounds(2, 3)), nodes(2)))
    assert column(rows, "dp_shard", "zero") == {(1, 3), (2, 2), (2, 3)}
    assert length(rows) == len(column(rows, *(name for name in rows if name not in {"shape", "least", "most"})))


def test_plans_of_one_mesh() -> None:
    found = space(job(), nodes(4))
    rows = only(found, Mesh(dp_shard=2, tp=2))
    assert length(rows) > 3
    assert column(rows, "dp_shard", "tp", "pp") == {(2, 2, 1)}
    assert length(only(found, Mesh(tp=3))) == length(only(found, Mesh(dp_shard=5))) == 0
