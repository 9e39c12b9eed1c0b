"""Whatever racks the nodes are in: a legal assignment, on as few racks as possible, whatever their order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, groupby

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.core.types import Assignment, Mesh, NodeCapacity
from orchestrator.planner.assign import assign
from orchestrator.planner.hardware import CATALOGUE
from orchestrator.planner.pool import Pool

NUMBERS = st.permutations(range(1, 11))


@st.composite
def pools(draw: st.DrawFn, sizes: tuple[int, ...] = (1, 2, 4, 6, 8)) -> Pool:
    numbers = draw(NUMBERS)[: draw(st.integers(1, 10))]
    size = st.sampled_from(sizes) if draw(st.booleans()) else st.just(draw(st.sampled_from(sizes)))
    rack = st.sampled_from(["", "a", "b", "c", "d"])
    nodes = tuple(NodeCapacity(f"node-{number}", draw(size), rack=draw(rack)) for number in numbers)
    speeds = {node.node: 1.5 for node in nodes if draw(st.booleans())} if draw(st.booleans()) else {}
    return Pool(nodes, draw(st.integers(1, 12)), CATALOGUE["h100"], 0, speeds)


def plain(pool: Pool) -> Pool:
    return replace(pool, nodes=tuple(replace(node, rack="") for node in pool.nodes))


def split_groups(pool: Pool, mesh: Mesh, found: Assignment) -> int:
    """How many `tp` groups have ranks on several nodes."""
    place = [part.node for part in found for _ in range(part.devices)]
    return sum(len(set(place[first : first + mesh.tp])) > 1 for first in range(0, mesh.world_size, mesh.tp))


@settings(deadline=None, max_examples=300)
@given(pools(), st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.data())
def test_an_assignment_is_legal_whatever_the_racks(pool: Pool, tp: int, min_nodes: int, data: st.DataObject) -> None:
    assume(min_nodes <= min(pool.limit, len(pool.nodes)))
    most = pool.aligned(tp) // tp
    assume(most * tp >= min_nodes and most)
    mesh = Mesh(dp_shard=data.draw(st.integers(-(-min_nodes // tp), most)), tp=tp)
    previous = None
    if data.draw(st.booleans()):
        earlier = Mesh(dp_shard=data.draw(st.integers(1, pool.aligned(1))))
        previous = assign(plain(pool), earlier, 1, None)
    found = assign(pool, mesh, min_nodes, previous)
    room = {node.node: node.devices for node in pool.nodes}
    assert len(set(found.names)) == len(found.names) and min_nodes <= len(found.names) <= pool.limit
    assert all(1 <= part.devices <= room[part.node] for part in found)
    ranks = [rank for part in found for rank in range(part.first_rank, part.first_rank + part.devices)]
    assert ranks == list(range(mesh.world_size))
    # as good as without racks: as many nodes, of the same sizes and speeds, and no more groups that cross nodes
    before = assign(plain(pool), mesh, min_nodes, previous)
    assert len(found.names) == len(before.names)
    for worth in (room.__getitem__, pool.speed_of):
        assert Counter(map(worth, found.names)) == Counter(map(worth, before.names))
    assert split_groups(pool, mesh, found) <= split_groups(pool, mesh, before)
    # nodes of a rack that are as fast as each other follow each other
    rack_of = {node.node: node.rack for node in pool.nodes}
    runs = [key for key, _ in groupby((pool.speed_of(name), rack_of[name]) for name in found.names) if key[1]]
    assert len(runs) == len(set(runs))
    # the order of nodes does not matter, and a second look changes nothing
    shuffled = replace(pool, nodes=tuple(data.draw(st.permutations(pool.nodes))))
    assert assign(shuffled, mesh, min_nodes, previous) == found
    assert assign(pool, mesh, min_nodes, found) == found


@settings(deadline=None, max_examples=200)
@given(pools(sizes=(8,)), st.data())
def test_no_fewer_racks_would_do(pool: Pool, data: st.DataObject) -> None:
    pool = replace(pool, faster={})
    count = data.draw(st.integers(1, min(pool.limit, len(pool.nodes))))
    previous = assign(plain(pool), Mesh(dp_shard=8), 1, None) if data.draw(st.booleans()) else None
    found = assign(pool, Mesh(dp_shard=8 * count), 1, previous)
    rooms = Counter(node.rack or node.node for node in pool.nodes)
    rack_of = {node.node: node.rack or node.node for node in pool.nodes}
    used = {rack_of[name] for name in found.names}
    fewest = next(
        number
        for number in range(1, count + 1)
        if any(sum(some) >= count for some in combinations(rooms.values(), number))
    )
    assert len(used) == fewest
