"""The search at 16,384 devices and on a laptop: `python -m tests.bench.planner.search`.

Peers are measured in the same run: weighing every legal plan whatever its bound (on 512 devices: there are too many of
them on 16,384), and planning for each loss by itself instead of the ladder. Prints JSON; `ratio` is ours / peer, by
medians of processor time on one core.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from orchestrator.core.spec import JobSpec, ModelSpec
from orchestrator.core.types import NodeCapacity
from orchestrator.planner import Planned, frontier, ladder, plan
from orchestrator.planner.frontier import Ranking, Wish
from orchestrator.planner.judge import judge
from orchestrator.planner.legality import legal
from orchestrator.planner.pool import pools, usable
from orchestrator.planner.space import Space
from tests.unit.planner.jobs import LLAMA_405B, job, nodes

ROUNDS = 5
LOSSES = 8


def seconds(work: Callable[[], object]) -> float:
    """Median of `ROUNDS` runs, processor time."""
    spent = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return statistics.median(spent)


def planned(spec: JobSpec, capacity: list[NodeCapacity]) -> Planned:
    answer = plan(spec, capacity)
    assert isinstance(answer, Planned)
    return answer


def large() -> dict[str, Any]:
    """Plan and ladder for Llama 3 405B on 2,048 nodes of 8 H100."""
    spec, capacity = job(LLAMA_405B, global_batch=2048), nodes(2048, 8, "h100")
    first = planned(spec, capacity)
    names = first.assignment.names
    left = [[node for node in capacity if node.node not in set(names[-n:])] for n in range(1, LOSSES + 1)]
    rungs_s = seconds(lambda: ladder(spec, capacity, first, LOSSES))
    alone_s = seconds(lambda: [plan(spec, rest, first.plan, first.assignment) for rest in left])
    return {
        "devices": 16384,
        "mesh": str(first.plan.mesh),
        "weighed": first.weighed,
        "plan_s": round(seconds(lambda: plan(spec, capacity)), 3),
        "ladder_of_8_s": round(rungs_s, 3),
        "eight_plans_s": round(alone_s, 3),
        "ratio": round(rungs_s / alone_s, 2),
    }


def bounded(model: ModelSpec) -> dict[str, Any]:
    """The most promising plans first, against all of them, on 64 nodes of 8 H100."""
    spec, capacity = job(model, global_batch=512), nodes(64, 8, "h100")
    pool = pools(spec, usable(spec, capacity))[0]
    space, weigher = Space(spec, pool, legal(spec, pool.devices)), judge(spec, pool)

    def search(at_once: int) -> Ranking:
        found = Ranking()
        frontier.fastest(space, weigher, Wish(), found, at_once)
        return found

    ours, peer = search(0), search(10**9)
    assert ours.step.min() == peer.step.min()
    ours_s, peer_s = seconds(lambda: search(0)), seconds(lambda: search(10**9))
    return {
        "weighed": ours.weighed,
        "all": peer.weighed,
        "ours_s": round(ours_s, 4),
        "peer_s": round(peer_s, 4),
        "ratio": round(ours_s / peer_s, 3),
    }


def measure() -> dict[str, Any]:
    """All comparisons."""
    return {
        "16384 devices": large(),
        "bounded against all": bounded(LLAMA_405B),
        "laptop": {
            "plan_ms": round(1000 * seconds(lambda: planned(job(), nodes(4))), 2),
            "undescribed_plan_ms": round(1000 * seconds(lambda: planned(job(None), nodes(4))), 2),
        },
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
