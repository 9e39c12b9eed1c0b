from __future__ import annotations

from orchestrator.core.types import AssignedNode, Assignment, Mesh, NodeCapacity
from orchestrator.planner.assign import assign
from orchestrator.planner.hardware import CATALOGUE
from orchestrator.planner.pool import Pool, natural
from tests.unit.planner.jobs import job, nodes, planned


def pool(*sizes: int, limit: int = 100) -> Pool:
    capacity = tuple(NodeCapacity(f"node-{index}", size) for index, size in enumerate(sizes, 1))
    return Pool(capacity, limit, CATALOGUE["cpu"], 0)


def shares(assignment: Assignment) -> list[tuple[str, int, int]]:
    return [(part.node, part.first_rank, part.devices) for part in assignment]


def test_names_sort_as_people_count() -> None:
    assert sorted(["node-10", "node-9", "a"], key=natural) == ["a", "node-9", "node-10"]


def test_ranks_are_contiguous_in_the_order_of_names() -> None:
    assert shares(assign(pool(2, 2, 2), Mesh(dp_shard=5), 1, None)) == [
        ("node-1", 0, 2),
        ("node-2", 2, 2),
        ("node-3", 4, 1),
    ]


def test_tensor_groups_stay_inside_nodes_of_odd_size() -> None:
    found = assign(pool(3, 4, 4), Mesh(dp_shard=5, tp=2), 1, None)
    assert shares(found) == [("node-1", 0, 2), ("node-2", 2, 4), ("node-3", 6, 4)]
    found = assign(pool(3, 3, 2), Mesh(dp_shard=3, tp=2), 1, None)
    assert shares(found) == [("node-1", 0, 2), ("node-2", 2, 2), ("node-3", 4, 2)]


def test_tensor_groups_cross_nodes_where_nodes_are_too_small() -> None:
    assert len(assign(pool(1, 1, 1, 1), Mesh(dp_shard=2, tp=2), 1, None).names) == 4


def test_at_least_the_minimum_of_nodes_is_used() -> None:
    assert shares(assign(pool(8, 8), Mesh(dp_shard=4), 2, None)) == [("node-1", 0, 2), ("node-2", 2, 2)]
    crossing = assign(pool(8, 1), Mesh(tp=4), 2, None)
    assert sorted(part.devices for part in crossing) == [1, 3]


def test_survivors_keep_their_order_and_newcomers_come_last() -> None:
    before = Assignment((AssignedNode("node-3", 0, 1), AssignedNode("node-1", 1, 1), AssignedNode("node-2", 2, 1)))
    after = assign(pool(1, 1, 1, 1), Mesh(dp_shard=4), 1, before)
    assert after.names == ("node-3", "node-1", "node-2", "node-4")


def test_nodes_of_the_previous_plan_are_chosen_before_others() -> None:
    spec = job(max_nodes=3)
    before = planned(spec, nodes(4)[1:]).assignment
    assert planned(spec, nodes(4), None, before).assignment.names == before.names
    assert planned(spec, nodes(4)).assignment.names == ("node-1", "node-2", "node-3")


def test_devices_per_node_caps_what_a_node_gives() -> None:
    answer = planned(job(devices_per_node=2), nodes(2, 8))
    assert [part.devices for part in answer.assignment] == [2, 2]
