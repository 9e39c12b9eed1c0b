"""Small clusters for tests of the simulation."""

from __future__ import annotations

from typing import Any

from orchestrator.simulation.failures import FailureModel, Outage
from orchestrator.simulation.policies import POLICIES
from orchestrator.simulation.study import Study
from orchestrator.simulation.timing import Timing
from orchestrator.simulation.world import World
from tests.unit.planner.jobs import LLAMA_8B, job, nodes

DAY_S = 86400.0
OFTEN = FailureModel("tests", per_1000_node_days=100, job_per_day=0.5, maintenance_per_day=0.5, notice_s=600)
SPEC = job(LLAMA_8B, global_batch=512)
CLUSTER = tuple(nodes(16, 8, "h100", first=0))


def study(**changes: Any) -> Study:
    """Sixteen nodes for ten days, nodes lost often."""
    chosen: dict[str, Any] = {"job": SPEC, "policies": tuple(POLICIES.values()), "days": 10.0, "failures": OFTEN}
    return Study(nodes=CLUSTER, **(chosen | changes))


def world(outages: list[Outage], policy: str = "regrow", days: float = 1.0, **timing: float) -> World:
    """One life with these outages."""
    return World(SPEC, CLUSTER, outages, POLICIES[policy], Timing(**timing), days * DAY_S)
