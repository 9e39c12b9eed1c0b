"""Hangs: workers that are alive and do not progress. A collective makes all wait for one, so the one is looked for."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.fleet import Node
from orchestrator.core.history import History
from orchestrator.core.types import WorkerReport, WorkerState

MIN_HANG_S = 30.0
"""Shortest `hangAfter: auto`."""
HANG_STEPS = 10
"""`hangAfter: auto` in median steps."""
STOPPED_S = 10.0
"""A stopped worker is a hang after this long, or after `hangAfter` if that is shorter."""
SAVING_S = 300.0
"""Grace while workers save before a planned change: writing may take longer than any step."""


@dataclass(frozen=True, slots=True)
class Hang:
    """What is wrong, and for how long it has been so."""

    text: str
    age_s: float


def find_hang(
    history: History, workers: list[tuple[Node, WorkerReport]], median_step_s: float | None, now_s: float
) -> Hang | None:
    """The hang of the live generation, if there is one."""
    recovery = history.spec.recovery
    limit_s = recovery.hang_after_s or max(MIN_HANG_S, HANG_STEPS * (median_step_s or 0.0))
    alive = [(node, worker) for node, worker in workers if worker.state is not WorkerState.EXITED]
    for node, worker in alive:
        idle_s = _idle_s(node, worker, now_s)
        if worker.state is WorkerState.STOPPED and idle_s >= min(limit_s, STOPPED_S):
            return Hang(f"rank {worker.rank} on {node.name} hangs: its process is stopped for {idle_s:.1f} s", idle_s)
    if history.ran_s is None:
        age_s = now_s - history.started_s
        if age_s >= recovery.start_within_s:
            return Hang(f"generation {history.number} has not completed a step {age_s:.0f} s after its start", age_s)
        return None
    if not alive:
        return None
    if history.stopping is not None:
        limit_s = max(limit_s, SAVING_S)
    idle_s = min(_idle_s(node, worker, now_s) for node, worker in alive)
    if idle_s < limit_s:
        return None
    node, worker = max(alive, key=lambda pair: (pair[1].ping_age_s, _idle_s(pair[0], pair[1], now_s), -pair[1].rank))
    return Hang(
        f"no step for {idle_s:.1f} s (hangAfter {limit_s:g} s); rank {worker.rank} on {node.name} is furthest behind",
        idle_s,
    )


def _idle_s(node: Node, worker: WorkerReport, now_s: float) -> float:
    """Idle time that the agent saw, plus the age of its report, unless the silence is the agent's own."""
    return worker.idle_s + (now_s - node.heard_s if node.connected else 0.0)
