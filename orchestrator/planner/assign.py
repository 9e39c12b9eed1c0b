"""Ranks -> nodes: `tp` groups inside a node where the nodes allow it; fast nodes first, rack by rack."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from orchestrator.core.types import AssignedNode, Assignment, Mesh, NodeCapacity
from orchestrator.planner.pool import Pool, natural


def assign(pool: Pool, mesh: Mesh, min_nodes: int, previous: Assignment | None, slow_first: bool = False) -> Assignment:
    """Contiguous ranks on the fastest nodes, few but at least `min_nodes`; needs `mesh` to fit the pool.

    Of nodes that are as good they are those of the fewest racks, then those of `previous`; ranks go rack by rack, as
    far as nodes of a rack are as fast as each other. The fastest come first, or with `slow_first` last.
    """
    world = mesh.world_size
    roomy = sum(node.devices >= mesh.tp for node in pool.nodes)
    whole = pool.aligned(mesh.tp) >= world and min(roomy, world // mesh.tp) >= min_nodes
    order = _Order(pool, mesh.tp if whole else 1, previous)
    useful = [node for node in pool.nodes if order.room(node)]
    roomiest = sorted(useful, key=lambda node: (order.room(node), order.worth(node), order.age[node.node]))
    ordered = sorted(roomiest[: pool.limit], key=lambda node: (order.worth(node), order.age[node.node]))
    needed = max(min_nodes, len(_fill(ordered, world, order.unit)))
    ranked = order.of_ranks(_in_fewest_racks(ordered[:needed], roomiest, order), slow_first)
    best = sorted(ranked, key=order.worth)
    shares = _fill(best, world, order.unit)
    if len(shares) < min_nodes:
        shares = _spread(best, world, order.unit)
    nodes, first = [], 0
    for node in (node for node in ranked if node.node in shares):
        nodes.append(AssignedNode(node.node, first, shares[node.node]))
        first += shares[node.node]
    return Assignment(tuple(nodes))


class _Order:
    """What goes before what."""

    def __init__(self, pool: Pool, unit: int, previous: Assignment | None) -> None:
        self._pool, self.unit = pool, unit
        rank_of = {name: position for position, name in enumerate(previous.names)} if previous else {}
        self.age = {node.node: (rank_of.get(node.node, len(rank_of)), natural(node.node)) for node in pool.nodes}
        """Those used before, in their order, then the others by name."""
        self._new = len(rank_of)

    def is_new(self, node: NodeCapacity) -> bool:
        """Whether it was not used before."""
        return self.age[node.node][0] == self._new

    def room(self, node: NodeCapacity) -> int:
        """Most devices first: where not all nodes may be used, those that hold most are."""
        return -(node.devices // self.unit)

    def worth(self, node: NodeCapacity) -> tuple[float, int]:
        """The fastest first, as estimates count them, then most devices; nodes of the same worth are as good."""
        return -self._pool.speed_of(node.node), self.room(node)

    def of_ranks(self, nodes: Sequence[NodeCapacity], slow_first: bool) -> list[NodeCapacity]:
        """The fastest first, or last; of each speed rack by rack, as their oldest nodes go."""
        racks: dict[tuple[float, str], list[NodeCapacity]] = {}
        for node in sorted(nodes, key=lambda node: self.age[node.node]):
            racks.setdefault((-self._pool.speed_of(node.node), _rack(node)), []).append(node)
        sign = -1 if slow_first else 1
        return [node for (_, members) in sorted(racks.items(), key=lambda item: sign * item[0][0]) for node in members]


def _rack(node: NodeCapacity) -> str:
    """Its rack; a node that does not say it counts as a rack of its own, named as no rack can be."""
    return node.rack or f"/{node.node}"


def _by_rack(nodes: Sequence[NodeCapacity]) -> dict[str, list[NodeCapacity]]:
    found: dict[str, list[NodeCapacity]] = {}
    for node in nodes:
        found.setdefault(_rack(node), []).append(node)
    return found


def _in_fewest_racks(first: list[NodeCapacity], nodes: Sequence[NodeCapacity], order: _Order) -> list[NodeCapacity]:
    """These of all `nodes`, but instead of those as good as the last of them the ones that add fewest racks."""
    if len(first) == len(nodes):
        return first
    worth = order.worth(first[-1])
    sure = [node for node in first if order.worth(node) != worth]
    members = _by_rack([node for node in nodes if order.worth(node) == worth])
    wanted = len(first) - len(sure)
    racks = [rack for rack in _by_rack(sure) if rack in members]
    others = sorted(members.keys() - set(racks), key=lambda rack: _few_new(members[rack], order))
    free = sum(len(members[rack]) for rack in racks)
    racks += [others[at] for at in _fewest([len(members[rack]) for rack in others], wanted - free)]
    place = {rack: number for number, rack in enumerate(racks)}
    there = [node for rack in racks for node in members[rack]]
    there.sort(key=lambda node: (order.is_new(node), place[_rack(node)], order.age[node.node]))
    return sure + there[:wanted]


def _few_new(members: Sequence[NodeCapacity], order: _Order) -> tuple[object, ...]:
    """Sort key of a rack: most nodes used before, then where its oldest is."""
    return sum(map(order.is_new, members)) - len(members), order.age[members[0].node]


def _fewest(rooms: Sequence[int], wanted: int) -> list[int]:
    """Positions of as few rooms as hold `wanted`, the first ones where there is a choice."""
    largest = sorted(rooms, reverse=True)
    count = sum(total - room < wanted for room, total in zip(largest, accumulate(largest), strict=True))
    needed, found = largest[:count], []
    spare = sum(needed) - wanted
    for at, room in enumerate(rooms):
        if not needed:
            break
        if room >= needed[-1]:
            needed.remove(room)
        elif needed[-1] - room <= spare:
            spare -= needed.pop() - room
        else:
            continue
        found.append(at)
    return found


def _fill(nodes: Sequence[NodeCapacity], world: int, unit: int) -> dict[str, int]:
    """Devices by node, each node filled before the next is begun."""
    shares = {}
    for node in nodes:
        share = min(world, node.devices // unit * unit)
        if share > 0:
            shares[node.node] = share
            world -= share
    return shares


def _spread(nodes: Sequence[NodeCapacity], world: int, unit: int) -> dict[str, int]:
    """Devices by node, one unit to each in turn; a last part smaller than a unit cannot occur."""
    shares = dict.fromkeys((node.node for node in nodes), 0)
    room = {node.node: node.devices // unit * unit for node in nodes}
    while world > 0:
        for name in shares:
            if world > 0 and shares[name] < room[name]:
                shares[name] += unit
                world -= unit
    return {name: share for name, share in shares.items() if share}
