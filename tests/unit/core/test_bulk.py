"""What many nodes say at once is what they say one after the other."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.core.commands import MakePlan
from orchestrator.core.events import HeartbeatsArrived, NodeDisconnected, NodeReported, NodesReported, Tick
from orchestrator.core.facts import JobAccepted
from orchestrator.core.history import replay
from orchestrator.core.job import Job
from orchestrator.core.summary import summarize
from orchestrator.core.types import NodeReport
from tests.unit.core.test_decisions import spec

NAMES = ("a", "b", "c", "d")


def report(name: str, devices: int = 1) -> NodeReport:
    return NodeReport(name, f"{name}#1", "", devices)


def job() -> Job:
    return Job(replay([JobAccepted(0.0, spec(min_nodes=4), 0)]), 0.0)


def test_together_and_one_by_one_come_to_the_same() -> None:
    together, one_by_one = job(), job()
    commands = together.handle(NodesReported(1.0, tuple(map(report, NAMES))))
    for name in NAMES:
        last = one_by_one.handle(NodeReported(1.0, report(name)))
    assert [command.nodes for command in commands if isinstance(command, MakePlan)] == [
        command.nodes for command in last if isinstance(command, MakePlan)
    ]
    assert together.usable() == one_by_one.usable() and len(together.usable()) == 4
    assert together.reason == one_by_one.reason


def test_heartbeats_keep_all_but_the_silent_alive() -> None:
    one = job()
    one.handle(NodesReported(1.0, tuple(map(report, NAMES))))
    one.handle(NodeDisconnected(1.5, "d", "d#1"))
    assert one.handle(HeartbeatsArrived(3600.0, frozenset({"c"}))) == []
    one.handle(Tick(3600.0))
    assert set(one.history.lost) == {"c", "d"}, "one is silent, the other's connection is closed"
    assert [node.node for node in one.usable()] == ["a", "b"]


def test_a_node_that_lost_a_device_offers_fewer() -> None:
    """What is planned with is kept with the node: it must be made anew when the node says something else."""
    one = job()
    one.handle(NodesReported(1.0, tuple(report(name, 2) for name in NAMES)))
    assert {node.devices for node in one.usable()} == {2}
    one.handle(NodeReported(2.0, report("b", 1)))
    assert [node.devices for node in one.usable()] == [2, 1, 2, 2]


def test_the_rack_that_a_node_reports_is_offered_and_shown() -> None:
    one = job()
    one.handle(NodesReported(1.0, (*map(report, NAMES[:3]), replace(report("d"), rack="rack-7"))))
    assert [node.rack for node in one.usable()] == ["", "", "", "rack-7"]
    assert [node.rack for node in summarize(one).nodes] == ["", "", "", "rack-7"]
