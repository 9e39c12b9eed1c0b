"""What a policy makes of a job, and that answers known from before are the planner's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.planner import Planned
from orchestrator.simulation.failures import FailureModel
from orchestrator.simulation.policies import POLICIES, Planner
from tests.simulation.studies import CLUSTER, SPEC, study
from tests.unit.planner.jobs import LLAMA_70B, job, nodes, planned


@pytest.mark.parametrize("thinner", [1.0, 32.0])
def test_other_nodes_of_the_same_number_get_what_the_planner_answers(thinner: float) -> None:
    spec = replace(SPEC, rack_oversubscription=thinner)
    lying = study(failures=FailureModel(rack_nodes=4)).placed
    planner, first = Planner(spec, POLICIES["regrow"]), planned(spec, lying)
    for gone in ({"node-0", "node-1"}, {"node-1", "node-6"}, {"node-4", "node-15"}):
        left = [node for node in lying if node.node not in gone]
        fresh = planned(spec, left, first.plan, first.assignment)
        again = planner.plan(left, first.plan, first.assignment)
        assert isinstance(again, Planned)
        assert again.plan == fresh.plan and len(again.assignment.names) == len(fresh.assignment.names)
        assert set(again.assignment.names).isdisjoint(gone)
        if thinner > 1:
            assert again == fresh, "where racks matter, so does who is left"


@pytest.mark.parametrize("name", ["wait", "spares", "baseline"])
def test_who_never_shrinks_asks_for_the_nodes_of_the_best_plan(name: str) -> None:
    """A batch of 96 leaves nodes idle: waiting for those would be waiting for nothing."""
    spec, capacity = job(LLAMA_70B, global_batch=96), nodes(29, 8, "h100", first=0)
    best = planned(spec, capacity[: 29 - POLICIES[name].held_back(29)])
    assert len(best.assignment.names) < len(capacity)
    told = POLICIES[name].spec(spec, capacity)
    assert told.min_nodes == told.max_nodes == len(best.assignment.names)
    assert told.recovery.wait_for_replacement_s is not None and told.recovery.wait_for_replacement_s > 1e9


def test_who_shrinks_takes_what_the_job_takes() -> None:
    told = POLICIES["regrow"].spec(SPEC, CLUSTER)
    assert (told.min_nodes, told.max_nodes) == (SPEC.min_nodes, len(CLUSTER))
