"""Capacity: which nodes may the job use now, and since when has that been so?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import NodeCapacity, NodeReport

FLAP_WINDOW_S = 3600.0
"""Losses longer ago than this no longer count against a node."""
MAX_HOLD_S = 600.0
"""Longest time for which a flapping node is held back."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that is HEALTHY and not drained."""

    node: str
    offer: NodeCapacity
    """What the planner is told of it."""
    joined_s: float
    """When it last became usable."""
    losses: tuple[float, ...]
    warm: bool


def hold_s(candidate: Candidate, settle_s: float, now_s: float) -> float:
    """Seconds for which a returned node is held back: from its second recent loss on, doubled with each."""
    return held_s(candidate.losses, settle_s, now_s)


def held_s(losses: Sequence[float], settle_s: float, now_s: float) -> float:
    """Seconds for which a node with these losses (times) is held back when it returns."""
    recent = sum(1 for lost_s in losses if now_s - lost_s < FLAP_WINDOW_S)
    return 0.0 if recent < 2 else min(MAX_HOLD_S, settle_s * 2.0 ** min(recent - 1, 20))


def settled(candidate: Candidate, settle_s: float, now_s: float) -> bool:
    """May a running job grow onto this node?"""
    steady_s = now_s - candidate.joined_s
    return candidate.warm and steady_s >= max(settle_s, hold_s(candidate, settle_s, now_s))


def choose(candidates: list[Candidate], spec: JobSpec, now_s: float, keep: tuple[str, ...]) -> tuple[NodeCapacity, ...]:
    """The nodes to plan for when nothing runs: those not held back, or all when too few are left otherwise.

    At most `spec.max_nodes`: those of the last assignment (`keep`) first, then by name. Where racks matter all are
    offered: the planner takes as many in few racks.
    """
    settle_s = spec.recovery.settle_s
    steady = [one for one in candidates if not one.losses or now_s - one.joined_s >= hold_s(one, settle_s, now_s)]
    pool = steady if len(steady) >= spec.min_nodes else candidates
    if len(pool) > spec.max_nodes and spec.rack_oversubscription == 1:
        kept = frozenset(keep)
        pool = sorted(pool, key=lambda one: (one.node not in kept, one.node))[: spec.max_nodes]
    return tuple(one.offer for one in sorted(pool, key=lambda one: one.node))


def offer(report: NodeReport, spec: JobSpec) -> NodeCapacity:
    """What the planner is told of a node: at most `spec.devices_per_node` of its devices."""
    wanted = report.devices if spec.devices_per_node is None else min(report.devices, spec.devices_per_node)
    kind = spec.device_kind or report.device_kind
    return NodeCapacity(report.node, wanted, report.device_memory_bytes, kind, report.speed, report.rack)
