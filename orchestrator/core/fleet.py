"""The observed half of a job's state: what the nodes last said. Never stored; a restarted controller asks anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from orchestrator.core.capacity import Candidate
from orchestrator.core.types import ENDED, AssignedNode, LaunchReport, LaunchState, NodeReport, WorkerReport

STEP_SAMPLES = 20
"""Step durations kept for the median."""


@dataclass(slots=True)
class Node:
    """One node as last heard of."""

    name: str
    heard_s: float
    """Time of its last report (or of the controller's start, when it has not reported yet)."""
    joined_s: float
    """When this start of its agent first reported."""
    connected: bool | None = None
    report: NodeReport | None = None
    suspect_since_s: float | None = None
    launched: int = 0
    """Highest generation that this start of its agent has reported."""
    restarted: bool = False
    """Its agent started anew while a generation that it was part of was live."""
    candidate: Candidate | None = None
    """What may be planned with, as it was made last; None when it has to be made anew."""

    def launch_of(self, generation: int) -> LaunchReport | None:
        """What it last said about that generation; None when it does not run it."""
        launch = self.report.launch if self.report else None
        return launch if launch is not None and launch.generation == generation else None

    def is_free_of(self, generation: int) -> bool:
        """True when it has said that no process of that generation is alive on it."""
        if self.report is None:
            return False
        launch = self.launch_of(generation)
        return launch is None or launch.state in ENDED


@dataclass(slots=True)
class StepClock:
    """Median duration of a step, from the progress that reports show."""

    step: int = 0
    seen_s: float | None = None
    samples_s: list[float] = field(default_factory=list)

    def observe(self, step: int, now_s: float) -> None:
        """`step` steps are complete at `now_s`."""
        if self.seen_s is not None and step > self.step:
            self.samples_s.append((now_s - self.seen_s) / (step - self.step))
            del self.samples_s[:-STEP_SAMPLES]
        if self.seen_s is None or step > self.step:
            self.step, self.seen_s = step, now_s

    @property
    def median_s(self) -> float | None:
        """None before two steps have been seen."""
        ordered = sorted(self.samples_s)
        return ordered[len(ordered) // 2] if ordered else None


@dataclass(slots=True)
class Fleet:
    """All nodes that have been heard of or are expected."""

    nodes: dict[str, Node] = field(default_factory=dict)
    _ordered: list[Node] = field(default_factory=list)

    def expect(self, name: str, now_s: float) -> Node:
        """The node of that name; a placeholder when it has not reported yet."""
        node = self.nodes.get(name)
        if node is None:
            node = self.nodes[name] = Node(name, heard_s=now_s, joined_s=now_s)
        return node

    def observe(self, report: NodeReport, now_s: float, live_generation: int | None) -> Node:
        """Take in a heartbeat. `live_generation`: the one the node is part of, if it is part of one."""
        node = self.expect(report.node, now_s)
        before = node.report
        if before is None or before.instance != report.instance:
            node.restarted = before is not None and live_generation is not None and node.launched >= live_generation
            node.joined_s, node.launched = now_s, 0
        if before is None or _device(before) != _device(report):
            node.candidate = None
        node.report, node.connected, node.heard_s, node.suspect_since_s = report, True, now_s, None
        if report.launch is not None:
            node.launched = max(node.launched, report.launch.generation)
        return node

    def in_order(self) -> list[Node]:
        """All nodes by name."""
        if len(self._ordered) != len(self.nodes):
            self._ordered = sorted(self.nodes.values(), key=lambda one: one.name)
        return self._ordered

    def hear(self, silent: frozenset[str], now_s: float) -> None:
        """All connected nodes but the `silent` ones have said again what they said last."""
        for node in self.nodes.values():
            if node.connected and node.name not in silent:
                node.heard_s = now_s

    def disconnect(self, name: str, instance: str, now_s: float) -> None:
        """The connection of that start of the agent is closed; another start's is not."""
        node = self.nodes.get(name)
        if node is not None and node.report is not None and node.report.instance == instance:
            node.connected, node.suspect_since_s = False, now_s

    def launches(self, assignment: Iterator[AssignedNode], generation: int) -> list[tuple[Node, LaunchReport | None]]:
        """What each assigned node says about the generation."""
        return [(self.nodes[part.node], self.nodes[part.node].launch_of(generation)) for part in assignment]


def _device(report: NodeReport) -> tuple[object, ...]:
    offered = report.devices, report.device_memory_bytes, report.device_kind, report.rack, report.speed
    return report.instance, report.warm, *offered


def workers(launches: list[tuple[Node, LaunchReport | None]]) -> list[tuple[Node, WorkerReport]]:
    """All workers of a generation with their nodes."""
    return [(node, worker) for node, launch in launches if launch is not None for worker in launch.workers]


def all_in(launches: list[tuple[Node, LaunchReport | None]], *states: LaunchState) -> bool:
    """True when every assigned node reports one of `states`."""
    return all(launch is not None and launch.state in states for _, launch in launches)
