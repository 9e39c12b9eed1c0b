"""Seconds to simulate 54 days of 2,048 nodes under one policy, and what all policies come to: `make bench`.

The limit: the core and the planner are Python and look at 2,048 nodes for each of some 5,000 events.
"""

from __future__ import annotations

import os
import time
from typing import Any

from orchestrator.core.spec import CheckpointSpec, JobSpec, ModelSpec
from orchestrator.core.types import Entrypoint, NodeCapacity
from orchestrator.simulation import study
from orchestrator.simulation.failures import PRESETS
from orchestrator.simulation.policies import POLICIES

LLAMA_405B = ModelSpec(126, 16384, 128, 8, 53248, 128256, 8192)
DAYS = float(os.environ.get("REGROW_BENCH_DAYS", "54"))
SEEDS = int(os.environ.get("REGROW_BENCH_SEEDS", "3"))


def measure() -> dict[str, Any]:
    """Seconds of one simulation on one core, and the table of policies with the spread over seeds."""
    job = JobSpec("llama-405b", Entrypoint("train.py"), CheckpointSpec("/checkpoints"), 2048, 1, 4096, model=LLAMA_405B)
    nodes = tuple(NodeCapacity(f"node-{number}", 8, 80 << 30, "h100") for number in range(2048))
    wanted = study.Study(
        job, nodes, tuple(POLICIES.values()), DAYS, tuple(range(1, SEEDS + 1)), failures=PRESETS["llama3"]
    )
    began = time.process_time()
    study.simulate(wanted, POLICIES["regrow"], 1)
    alone_s = time.process_time() - began
    results = study.run(wanted, os.cpu_count() or 1)
    policies = {
        one.policy.name: {
            "goodput": round(one.goodput, 4),
            "spread": round(one.spread, 4),
            "least": round(one.least, 4),
            "most": round(one.most, 4),
            "ettr": round(one.ettr, 4),
            "interruptions": round(one.interruptions, 1),
        }
        for one in study.summarize(wanted, results)
    }
    return {"days": DAYS, "nodes": len(nodes), "seconds_of_one_core": round(alone_s, 1), "policies": policies}
