"""Which nodes a plan may draw on together: the same collective backend, and how fast each of them is."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import NodeCapacity
from orchestrator.planner.hardware import CATALOGUE, GIB, Device, Machine, find

Signature: TypeAlias = "tuple[tuple[tuple[int, int], ...], int, Machine, int, tuple[tuple[float, int], ...]]"

_MOST_POOLS = 6
_RATES = ("flops_per_s", "fp8_flops_per_s", "fp4_flops_per_s", "exponentials_per_s", "memory_bytes_per_s")
"""What is slower on a slow node: all that computing is divided by, so that it can be scaled by one speed."""
_UNKNOWN = replace(CATALOGUE["a100"], name="unknown", memory_bytes=0)
"""What a device outside the catalogue is taken for: some GPU. It ranks meshes; its seconds mean little."""


@dataclass(frozen=True)
class Pool:
    """Nodes that train together, of which at most `limit` are used."""

    nodes: tuple[NodeCapacity, ...]
    """Most devices first, then by name."""
    limit: int
    device: Device
    """The slowest of them."""
    memory_bytes: int
    """The smallest that is known; 0 when none is."""
    faster: Mapping[str, float] = field(default_factory=dict, repr=False)
    """Nodes that are faster than the slowest -> how many times."""
    oversubscription: float = 1.0
    """How many times thinner the network between racks is than inside them."""
    devices_by_speed: tuple[tuple[float, int], ...] = field(init=False, repr=False, compare=False)
    """(speed, devices that have it) of as many nodes as may be used, the slowest first."""
    _sizes: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    """(devices, number of nodes that have so many)."""
    _rack: int = field(init=False, repr=False, compare=False)
    """Devices of a rack; 0 where none is known or the network is as thick everywhere."""
    _aligned: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = Counter(node.devices for node in self.nodes)
        object.__setattr__(self, "_sizes", tuple(sizes.items()))
        roomiest = sorted(self.nodes, key=lambda node: (-node.devices, -self.speed_of(node.node)))
        speeds: Counter[float] = Counter()
        for node in roomiest[: self.limit]:
            speeds[self.speed_of(node.node)] += node.devices
        object.__setattr__(self, "devices_by_speed", tuple(sorted(speeds.items())))
        object.__setattr__(self, "_rack", _rack(self.nodes) if self.oversubscription > 1 else 0)

    @property
    def devices(self) -> int:
        """Devices that a plan may use."""
        return self.aligned(1)

    @property
    def machine(self) -> Machine:
        """The device and its links; nodes and racks of several sizes count as those of the commonest."""
        machine = Machine.of(self.device, _commonest(self._sizes) if self._sizes else 1)
        return replace(machine, rack=self._rack, oversubscription=self.oversubscription) if self._rack else machine

    def speed_of(self, node: str) -> float:
        """How many times as fast as the slowest, in steps of a twentieth."""
        return self.faster.get(node, 1.0)

    def peak_flops_per_s(self, devices: int) -> float:
        """Of so many of the fastest devices together, as their vendors say; a throttled one counts in full."""
        total, left = 0.0, devices
        for node in sorted(self.nodes, key=lambda node: -self.speed_of(node.node)):
            total += min(left, node.devices) * (find(node.kind) or self.device).peak_flops_per_s
            left -= min(left, node.devices)
        return total

    @property
    def mixed(self) -> bool:
        """Whether its nodes are of several speeds."""
        return bool(self.faster)

    @property
    def speeds(self) -> tuple[float, ...]:
        """Each speed once, the slowest first."""
        return tuple(speed for speed, _ in self.devices_by_speed)

    @property
    def signature(self) -> Signature:
        """The same for pools on which the same plans are legal and as fast, whichever nodes they are of."""
        return tuple(sorted(self._sizes)), self.limit, self.machine, self.memory_bytes, self.devices_by_speed

    @property
    def kinds(self) -> list[NodeCapacity]:
        """One node of each kind and memory."""
        return list({(node.kind, node.memory_bytes): node for node in self.nodes}.values())

    @property
    def alike(self) -> bool:
        """Whether all nodes have as many devices: then what fits on some of them fits on any as many."""
        return len(self._sizes) == 1

    def grouped(self, tp: int, nodes: int, asked: bool) -> tuple[int, int]:
        """The most devices that groups of `tp` can use, and the fewest that lie on `nodes` nodes; (0, 0): no room.

        A group lies inside the fast domain. Only where every link is as fast (processors), or the job file has no
        smaller size (`asked`), groups may cross nodes.
        """
        largest = max((size for size, _ in self._sizes), default=0)
        if self.device.backend == "gloo" or (asked and tp > largest):
            return self.devices, nodes
        if largest < tp <= self.machine.domain and tp % largest == 0:
            return self.devices // tp * tp, nodes
        roomy = sum(count for size, count in self._sizes if size >= tp)
        return (self.aligned(tp), nodes * tp) if roomy >= nodes else (0, 0)

    def aligned(self, span: int) -> int:
        """Devices that can be used when every node gives a multiple of `span`."""
        if span not in self._aligned:
            left, devices = self.limit, 0
            for whole, count in sorted(((size // span * span, count) for size, count in self._sizes), reverse=True):
                devices += whole * min(left, count)
                left -= min(left, count)
            self._aligned[span] = devices
        return self._aligned[span]


def _commonest(sizes: tuple[tuple[int, int], ...]) -> int:
    """Of (size, number of things that have it), the size that most have; the largest of several."""
    return max(sizes, key=lambda one: (one[1], one[0]))[0]


def _rack(nodes: Iterable[NodeCapacity]) -> int:
    """Devices of a rack; 0 where no node says in which it is."""
    devices: Counter[str] = Counter()
    for node in nodes:
        if node.rack:
            devices[node.rack] += node.devices
    return _commonest(tuple(Counter(devices.values()).items())) if devices else 0


@lru_cache(maxsize=1 << 16)
def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which `node-2` comes before `node-10`."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((1, int(part), part) if part.isdecimal() and part.isascii() else (0, 0, part) for part in parts)


def usable(spec: JobSpec, capacity: Iterable[NodeCapacity]) -> list[NodeCapacity]:
    """Nodes with a device to give, each once, cut to `devices_per_node` and of the kind that the job file says, if it
    does; in an order independent of the input's.
    """
    ordered = sorted(capacity, key=_whatever)
    once = {node.node: _as_told(spec, node) for node in reversed(ordered)}
    some = (node for node in once.values() if node.devices > 0)
    return sorted(some, key=lambda node: (-node.devices, natural(node.node)))


def _as_told(spec: JobSpec, node: NodeCapacity) -> NodeCapacity:
    devices = node.devices if spec.devices_per_node is None else min(node.devices, spec.devices_per_node)
    kind = spec.device_kind or node.kind
    return node if (devices, kind) == (node.devices, node.kind) else replace(node, devices=devices, kind=kind)


def _whatever(node: NodeCapacity) -> tuple[object, ...]:
    """By name, then by whatever tells nodes apart."""
    return natural(node.node), node.devices, node.memory_bytes, node.kind, node.speed, node.rack


def pools(spec: JobSpec, nodes: Sequence[NodeCapacity]) -> list[Pool]:
    """Groups of `nodes` worth planning for: all of one backend, and all but the slowest or smallest kinds.

    More than a few kinds are cut to evenly spaced ones.
    """
    found = []
    devices = {kind: find(kind) or _UNKNOWN for kind in {node.kind for node in nodes}}
    described = [(node, devices[node.kind]) for node in nodes]
    for backend in sorted({device.backend for _, device in described}):
        mine = [(node, device) for node, device in described if device.backend == backend]
        kinds = {_kind(node): _grade(node, device) for node, device in mine}
        grades = sorted(set(kinds.values()), reverse=True)
        step = -(-len(grades) // _MOST_POOLS)
        for lowest in grades[::-1][::step]:
            kept = [(node, device) for node, device in mine if kinds[_kind(node)] >= lowest]
            unlike = {_kind(node): _throttled(device, node.speed) for node, device in kept}
            slowest = min(unlike.values(), key=_slowness)
            memory = min(_memory(node, device) for node, device in kept)
            known = 0 if memory == math.inf else int(memory)
            times = {kind: _times(device, slowest) for kind, device in unlike.items()}
            faster = {node.node: times[_kind(node)] for node, _ in kept if times[_kind(node)] > 1}
            members = tuple(node for node, _ in kept)
            found.append(Pool(members, spec.max_nodes, slowest, known, faster, spec.rack_oversubscription))
    return found


def _times(device: Device, slowest: Device) -> float:
    """How many times as fast, rounded down to a twentieth so that there are few speeds."""
    return math.floor(device.flops_per_s / slowest.flops_per_s * 20 + 1e-6) / 20


def _kind(node: NodeCapacity) -> tuple[str, int, float]:
    """What makes a node's grade, its device's apart."""
    return node.kind, node.memory_bytes, node.speed


def _throttled(device: Device, speed: float) -> Device:
    """The device as fast as a node's `speed` says; links are as ever."""
    return device if speed == 1 else _slowed(device, speed)


@lru_cache(maxsize=1 << 10)
def _slowed(device: Device, speed: float) -> Device:
    rates = {name: getattr(device, name) * speed for name in _RATES}
    return replace(device, **rates)


def _slowness(device: Device) -> tuple[float, str]:
    return device.flops_per_s, device.name


def _memory(node: NodeCapacity, device: Device) -> float:
    return node.memory_bytes or device.memory_bytes or math.inf


def _grade(node: NodeCapacity, device: Device) -> tuple[float, float]:
    """Speed and memory in whole GiB: nodes of one grade are used together."""
    memory = _memory(node, device)
    return _throttled(device, node.speed).flops_per_s, memory if memory == math.inf else round(memory / GIB)
