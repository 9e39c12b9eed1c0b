"""What a node says of its rack reaches the planner and the status, also from an agent that says nothing."""

from __future__ import annotations

import json
from dataclasses import replace

from orchestrator import wire
from orchestrator.core.capacity import Candidate, choose, offer
from orchestrator.core.events import NodesReported
from orchestrator.core.facts import JobAccepted
from orchestrator.core.history import replay
from orchestrator.core.job import Job
from orchestrator.core.spec import CheckpointSpec, JobSpec
from orchestrator.core.summary import summarize
from orchestrator.core.types import Entrypoint, NodeCapacity, NodeReport

SPEC = JobSpec("gpt", Entrypoint("train.py"), CheckpointSpec("file:///c"), 48, max_nodes=2)
REPORT = NodeReport("node-1", "i", "", 8, "h100", rack="r07")


def test_the_rack_travels_with_the_heartbeat() -> None:
    assert wire.unpack(wire.pack(report=REPORT), "report", NodeReport) == REPORT


def test_an_agent_that_knows_nothing_of_racks_is_understood() -> None:
    message = json.loads(wire.pack(report=REPORT))
    del message["report"]["rack"]
    assert wire.unpack(json.dumps(message), "report", NodeReport) == replace(REPORT, rack="")


def test_a_journal_from_before_racks_is_read() -> None:
    text = wire.to_data(SPEC)
    del text["rack_oversubscription"]
    assert wire.from_data(text, JobSpec) == SPEC


def test_the_planner_and_the_status_are_told() -> None:
    assert offer(REPORT, SPEC).rack == "r07"
    assert offer(replace(REPORT, speed=0.7), SPEC).speed == 0.7
    job = Job(replay([JobAccepted(0.0, SPEC, 0)]), 0.0)
    job.handle(NodesReported(1.0, (REPORT, replace(REPORT, node="node-2", rack=""))))
    assert [(node.node, node.rack) for node in summarize(job).nodes] == [("node-1", "r07"), ("node-2", "")]
    assert [node.speed for node in summarize(job).nodes] == [1.0, 1.0]
    job.handle(NodesReported(2.0, (replace(REPORT, speed=0.7),)))
    assert [node.speed for node in summarize(job).nodes] == [0.7, 1.0]


def test_which_nodes_is_left_to_the_planner_where_racks_matter() -> None:
    offers = [NodeCapacity(name, 8, rack=rack) for name, rack in (("a", "r1"), ("b", "r2"), ("c", "r2"))]
    candidates = [Candidate(one.node, one, 0.0, (), True) for one in offers]
    assert [one.node for one in choose(candidates, SPEC, 9.0, ())] == ["a", "b"]
    thinner = replace(SPEC, rack_oversubscription=4.0)
    assert [one.node for one in choose(candidates, thinner, 9.0, ())] == ["a", "b", "c"]
