"""Agents and controllers of several versions understand each other."""

from __future__ import annotations

import json

from orchestrator import wire
from orchestrator.core.types import NodeReport

REPORT = NodeReport("node-1", "node-1#1", "10.0.0.1", 8, "h100", rack="rack-7")


def test_a_report_carries_its_rack() -> None:
    assert wire.unpack(wire.pack(report=REPORT), "report", NodeReport) == REPORT


def test_an_agent_that_says_no_rack_is_understood() -> None:
    message = json.loads(wire.pack(report=REPORT))
    del message["report"]["rack"]
    assert wire.unpack(json.dumps(message), "report", NodeReport).rack == ""


def test_an_agent_that_says_more_is_understood() -> None:
    message = json.loads(wire.pack(report=REPORT))
    message["report"]["floor"] = 3
    assert wire.unpack(json.dumps(message), "report", NodeReport) == REPORT
