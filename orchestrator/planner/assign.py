"""Ranks -> nodes: `tp` groups inside a node where the nodes allow it, fast nodes first, then those used before."""

from __future__ import annotations

from orchestrator.core.types import AssignedNode, Assignment, Mesh, NodeCapacity
from orchestrator.planner.pool import Pool, natural


def assign(pool: Pool, mesh: Mesh, min_nodes: int, previous: Assignment | None, slow_first: bool = False) -> Assignment:
    """Contiguous ranks on as few nodes as possible, but at least `min_nodes`; needs `mesh` to fit the pool.

    With `slow_first` the slowest of the nodes that are taken come first, not last.
    """
    rank_of = {name: position for position, name in enumerate(previous.names)} if previous else {}

    def seniority(node: NodeCapacity) -> tuple[object, ...]:
        return (-pool.speed_of(node.node), rank_of.get(node.node, len(rank_of)), natural(node.node))

    world = mesh.world_size
    roomy = sum(node.devices >= mesh.tp for node in pool.nodes)
    whole = pool.aligned(mesh.tp) >= world and min(roomy, world // mesh.tp) >= min_nodes
    unit = mesh.tp if whole else 1
    senior = {node.node: seniority(node) for node in pool.nodes}
    ordered = sorted(pool.nodes, key=lambda node: (-(node.devices // unit), senior[node.node]))[: pool.limit]
    shares = _fill(ordered, world, unit)
    if len(shares) < min_nodes:
        shares = _spread(ordered[:min_nodes], world, unit)

    def rank(node: NodeCapacity) -> tuple[object, ...]:
        return (pool.speed_of(node.node) if slow_first else 0, senior[node.node])

    nodes, first = [], 0
    for node in sorted((node for node in ordered if node.node in shares), key=rank):
        nodes.append(AssignedNode(node.node, first, shares[node.node]))
        first += shares[node.node]
    return Assignment(tuple(nodes))


def _fill(nodes: list[NodeCapacity], world: int, unit: int) -> dict[str, int]:
    """Devices by node, each node filled before the next is begun."""
    shares = {}
    for node in nodes:
        share = min(world, node.devices // unit * unit)
        if share > 0:
            shares[node.node] = share
            world -= share
    return shares


def _spread(nodes: list[NodeCapacity], world: int, unit: int) -> dict[str, int]:
    """Devices by node, one unit to each in turn; a last part smaller than a unit cannot occur."""
    shares = dict.fromkeys((node.node for node in nodes), 0)
    room = {node.node: node.devices // unit * unit for node in nodes}
    while world > 0:
        for name in shares:
            if world > 0 and shares[name] < room[name]:
                shares[name] += unit
                world -= unit
    return {name: share for name, share in shares.items() if share}
