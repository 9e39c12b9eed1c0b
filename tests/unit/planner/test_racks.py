"""Racks: where ranks go, and what a thin network between racks does to plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import AssignedNode, Assignment, Mesh, NodeCapacity
from orchestrator.planner import Planned, Ready, ladder, plan
from orchestrator.planner.assign import assign
from orchestrator.planner.hardware import CATALOGUE
from orchestrator.planner.pool import Pool, pools, usable
from tests.unit.planner.jobs import LLAMA_8B, LLAMA_405B, job, nodes, planned


def pool(racks: str, devices: int = 2, limit: int = 100, faster: dict[str, float] | None = None) -> Pool:
    """A node in each of the racks `racks`, a letter each; `-` = not known. Named node-1 and so on."""
    capacity = (
        NodeCapacity(f"node-{number}", devices, rack=rack.strip("-")) for number, rack in enumerate(racks, start=1)
    )
    return Pool(tuple(capacity), limit, CATALOGUE["cpu"], 0, faster or {})


def used(pool: Pool, count: int, previous: Assignment | None = None, min_nodes: int = 1) -> list[int]:
    """Numbers of the nodes that `count` of them are assigned, in rank order."""
    devices = pool.nodes[0].devices
    found = assign(pool, Mesh(dp_shard=count * devices), min_nodes, previous)
    assert [part.first_rank for part in found] == [at * devices for at in range(count)]
    return [int(name.removeprefix("node-")) for name in found.names]


def without(pool: Pool, *numbers: int) -> Pool:
    gone = {f"node-{number}" for number in numbers}
    return replace(pool, nodes=tuple(node for node in pool.nodes if node.node not in gone))


def assignment(*numbers: int) -> Assignment:
    return Assignment(tuple(AssignedNode(f"node-{number}", 2 * at, 2) for at, number in enumerate(numbers)))


def before(pool: Pool, count: int) -> Assignment:
    return assign(pool, Mesh(dp_shard=count * pool.nodes[0].devices), 1, None)


def in_racks(number: int, per_rack: int, **changes: Any) -> list[NodeCapacity]:
    """Nodes of 8 H100, so many in a rack."""
    found = nodes(number, 8, "h100")
    return [replace(node, rack=f"rack-{at // per_rack}", **changes) for at, node in enumerate(found)]


def thin(spec: JobSpec, times: float = 4) -> JobSpec:
    return replace(spec, rack_oversubscription=times)


# ---------------------------------------------------------------- assignment


def test_ranks_go_rack_by_rack() -> None:
    assert used(pool("abcabca"), 7) == [1, 4, 7, 2, 5, 3, 6]
    assert used(pool("ba-ab"), 5) == [1, 5, 2, 4, 3], "a node that does not say its rack stands for itself"


@pytest.mark.parametrize(
    ("racks", "count", "expected"),
    [
        ("abbacc", 2, [1, 4]),
        ("abbbcc", 3, [2, 3, 4]),
        ("abbbcc", 5, [2, 3, 4, 5, 6]),
        ("abbbcc", 4, [1, 2, 3, 4]),
        ("aabbbcccc", 6, [1, 2, 6, 7, 8, 9]),
        ("--aa", 2, [3, 4]),
        ("a-b-", 2, [1, 2]),
    ],
)
def test_as_few_racks_as_possible_are_used(racks: str, count: int, expected: list[int]) -> None:
    assert used(pool(racks), count) == expected
    assert used(pool(racks, limit=count), count) == expected


def test_nodes_added_to_reach_the_minimum_are_of_few_racks_too() -> None:
    found = assign(pool("abab"), Mesh(dp_shard=2), 2, None)
    assert [(part.node, part.devices) for part in found] == [("node-1", 1), ("node-3", 1)]


def test_the_node_that_is_filled_in_part_has_the_last_ranks() -> None:
    found = assign(pool("abab"), Mesh(dp_shard=7), 1, None)
    assert [(part.node, part.devices) for part in found] == [("node-1", 2), ("node-3", 2), ("node-2", 2), ("node-4", 1)]


def test_survivors_stay_where_no_rack_is_saved() -> None:
    racks = pool("aaaabbbbcccc")
    six = before(racks, 6)
    assert six.names == tuple(f"node-{number}" for number in range(1, 7))
    assert used(without(racks, 2), 6, six) == [1, 3, 4, 5, 6, 7]
    assert used(without(racks, 6), 6, six) == [1, 2, 3, 4, 5, 7]
    assert used(racks, 6, six) == [1, 2, 3, 4, 5, 6]
    assert used(racks, 12, six) == list(range(1, 13))
    assert used(without(racks, 1, 2, 3), 5, six) == [4, 5, 6, 7, 8]
    assert used(pool("aaaabbbb"), 6, assignment(1, 2, 3, 5, 6, 7)) == [1, 2, 3, 5, 6, 7], "not 4 instead of one of them"
    assert used(pool("aabbbb"), 2, assignment(2, 3, 4)) == [3, 4], "more of them are in b"
    assert used(pool("aaabbbccc"), 3, before(pool("aaabbb---"), 5)) == [1, 2, 3]
    assert used(without(pool("aaabbbccc"), 1, 2), 3, before(pool("aaabbb---"), 5)) == [4, 5, 6]


def test_fewer_racks_come_before_survivors() -> None:
    racks = pool("aabbbbcccc")
    assert used(without(racks, 1), 4, before(racks, 6)) == [3, 4, 5, 6]
    assert used(without(pool("aaaabbbbcccc"), 1, 2, 3), 6, before(racks, 6)) == [5, 6, 7, 8, 9, 10]


def test_nodes_of_other_sizes_and_speeds_keep_their_places() -> None:
    mixed = pool("abab", faster={"node-3": 1.5, "node-4": 1.5})
    assert used(mixed, 4) == [3, 4, 1, 2]
    sizes = pool("baa")
    sizes = replace(sizes, nodes=(replace(sizes.nodes[0], devices=4), *sizes.nodes[1:]))
    assert assign(sizes, Mesh(dp_shard=6), 1, None).names == ("node-1", "node-2")
    own = replace(sizes, nodes=(*sizes.nodes[:2], replace(sizes.nodes[2], rack="b")))
    assert assign(own, Mesh(dp_shard=6), 1, None).names == ("node-1", "node-3"), "its rack is in use anyway"
    more = pool("bacccbbb")
    more = replace(more, nodes=(replace(more.nodes[0], devices=4), *more.nodes[1:]))
    found = assign(more, Mesh(dp_shard=14), 1, None)
    assert found.names == ("node-1", "node-6", "node-7", "node-8", "node-3", "node-4"), "the rest fits into c alone"
    small = replace(sizes, nodes=sizes.nodes[:2], faster={"node-2": 1.5})
    found = assign(small, Mesh(dp_shard=5), 1, None)
    assert [(part.node, part.devices) for part in found] == [("node-2", 2), ("node-1", 3)], "fast ones are filled first"


def test_a_node_that_is_named_twice_counts_once_whatever_comes_first() -> None:
    twice = [NodeCapacity("node-1", 1, rack="a"), NodeCapacity("node-1", 1, rack="b")]
    assert usable(job(), twice) == usable(job(), twice[::-1]) == twice[:1]


# ---------------------------------------------------------------- plans


def test_racks_do_not_matter_where_the_network_is_as_thick_between_them() -> None:
    for spec in (job(LLAMA_8B, global_batch=64), job(LLAMA_405B, global_batch=1024), job(None, tp=2)):
        apart, unknown = planned(spec, in_racks(32, 4)), planned(spec, nodes(32, 8, "h100"))
        assert apart == unknown
    slow = [*in_racks(6, 2), *(replace(one, node=f"{one.node}-slow") for one in in_racks(2, 1, speed=0.7))]
    spec = job(LLAMA_8B, global_batch=512)
    assert planned(spec, slow).chosen == planned(spec, [replace(node, rack="") for node in slow]).chosen


def test_a_thin_network_does_not_matter_where_no_rack_is_known_or_there_is_one() -> None:
    spec = job(LLAMA_8B, global_batch=64)
    unknown, plain = planned(thin(spec), nodes(8, 8, "h100")), planned(spec, nodes(8, 8, "h100"))
    assert unknown.chosen.seconds == plain.chosen.seconds and unknown.plan.mesh == plain.plan.mesh
    assert unknown.plan.reason.endswith("rackOversubscription does not count because no node says its rack")
    assert planned(thin(spec), in_racks(8, 8)) == plain


def test_a_thin_network_keeps_shards_inside_racks() -> None:
    spec, capacity = job(LLAMA_8B, global_batch=256), in_racks(8, 2)
    assert planned(spec, capacity).plan.mesh == Mesh(dp_shard=64)
    found = planned(thin(spec, 8), capacity)
    assert found.plan.mesh == Mesh(dp_replicate=4, dp_shard=16)
    assert "the network is 8 times thinner between racks of 16 devices" in found.plan.reason


def test_a_thin_network_puts_pipelines_across_racks_and_replicas_inside() -> None:
    spec, capacity = job(LLAMA_405B, global_batch=1024), in_racks(64, 4)
    wide, narrow = planned(spec, capacity), planned(thin(spec, 16), capacity)
    assert wide.plan.mesh.pp == 1
    mesh = narrow.plan.mesh
    assert mesh.pp > 1 and mesh.dp_degree * mesh.cp * mesh.tp <= 32
    flat = planned(thin(job(LLAMA_405B, global_batch=1024, pp=1), 16), capacity)
    assert wide.plan.step_s < narrow.plan.step_s < flat.plan.step_s


def test_the_commonest_rack_counts() -> None:
    spec = thin(job())
    racks = [*in_racks(7, 3), NodeCapacity("node-8", 8, kind="h100", rack="rack-2"), *nodes(4, 8, "h100", first=9)]
    (found,) = pools(spec, usable(spec, racks))
    assert (found.machine.rack, found.machine.oversubscription) == (24, 4.0)
    (found,) = pools(spec, usable(spec, in_racks(4, 3)))
    assert found.machine.rack == 24, "of several the largest"
    (found,) = pools(job(), usable(job(), racks))
    assert (found.machine.rack, found.machine.oversubscription) == (0, 1.0)


def test_the_ladder_is_what_plan_answers() -> None:
    spec, capacity = thin(job(LLAMA_8B, global_batch=64)), in_racks(8, 2)
    first = planned(spec, capacity)
    for losses, rung in enumerate(ladder(spec, capacity, first, 3), 1):
        left = [node for node in capacity if node.node not in first.assignment.names[-losses:]]
        anew = plan(spec, left, first.plan, first.assignment)
        assert isinstance(anew, Planned) and isinstance(rung, Planned)
        assert replace(rung, weighed=0) == replace(anew, weighed=0)


def test_searches_are_used_again_where_racks_are_the_same() -> None:
    spec, ready = thin(job(LLAMA_8B, global_batch=64)), Ready()
    for capacity in (in_racks(8, 2), in_racks(8, 4), nodes(8, 8, "h100")):
        assert planned(spec, capacity, ready=ready) == planned(spec, capacity)
    assert len(ready) == 3
    planned(spec, [replace(node, rack=f"other-{node.rack}") for node in in_racks(8, 2)], ready=ready)
    assert len(ready) == 3
    plain, ready = replace(spec, rack_oversubscription=1.0), Ready()
    for capacity in (in_racks(8, 2), in_racks(8, 4), nodes(8, 8, "h100")):
        planned(plain, capacity, ready=ready)
    assert len(ready) == 1
