from __future__ import annotations

from pathlib import Path

from agents.agent import Agent
from agents.settings import parse


def test_the_report_says_what_the_agent_was_told(tmp_path: Path) -> None:
    flags = [
        "--controller",
        "http://10.0.0.1:80",
        "--node",
        "node-0",
        "--devices",
        "2",
        "--rack",
        "r07",
        "--speed",
        "0.7",
    ]
    agent = Agent(parse([*flags, "--runtime-dir", str(tmp_path)], {"REGROW_TOKEN": "secret"}))
    report = agent.report()
    assert (report.node, report.devices, report.rack, report.speed) == ("node-0", 2, "r07", 0.7)
