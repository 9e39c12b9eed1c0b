"""Golden transcripts of the main stories: `stories/*.txt`, rewritten with `REGROW_REWRITE=1` and read in review.

A story is a list of actions (lines before `----`); what follows is everything the job recorded and ordered.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.core import events as e
from orchestrator.core.history import replay
from orchestrator.core.spec import Budget, CheckpointSpec, FailureClass, JobSpec, RecoverySpec, default_budgets
from orchestrator.core.types import Entrypoint
from tests.scenarios.model import Cluster

STORIES = sorted((Path(__file__).parent / "stories").glob("*.txt"))


def spec(**settings: str) -> JobSpec:
    budgets = default_budgets() | {FailureClass.TRANSIENT: Budget(int(settings.get("transient", 20)), 3600.0)}
    return JobSpec(
        name="gpt",
        entrypoint=Entrypoint("train.py"),
        checkpoint=CheckpointSpec("file:///ckpt", every_steps=10),
        global_batch=48,
        min_nodes=int(settings.get("min", 1)),
        max_nodes=int(settings.get("max", 4)),
        recovery=RecoverySpec(
            heartbeat_s=0.5,
            lost_after_s=6.0,
            hang_after_s=8.0,
            settle_s=2.0,
            wait_for_replacement_s=float(settings["replacement"]) if "replacement" in settings else None,
            budgets=budgets,
        ),
    )


def play(actions: str) -> Cluster:
    lines = [line.split("#")[0].split() for line in actions.splitlines()]
    lines = [words for words in lines if words]
    settings = dict(word.split("=") for word in lines[0][1:])
    assert lines[0][0] == "job"
    cluster = Cluster(spec(**settings))
    for verb, *rest in lines[1:]:
        cluster.log.append(f"> {verb} {' '.join(rest)}".rstrip())
        match verb:
            case "up":
                for name in rest:
                    cluster.up(name)
            case "kill":
                cluster.kill(*rest)
            case "silence":
                cluster.agents[rest[0]].silent = True
            case "speak":
                cluster.agents[rest[0]].silent = False
            case "stop-worker":
                cluster.agents[rest[0]].stopped_worker = True
            case "fail":
                cluster.fail(rest[0], rest[1] if len(rest) == 2 else " ".join(rest[1:]))
            case "restart-agent":
                cluster.restart_agent(rest[0])
            case "restart-controller":
                cluster.restart_controller()
            case "corrupt":
                cluster.corrupt.update(int(step) for step in rest)
            case "drain" | "undrain":
                cluster.handle(e.DrainOrdered(cluster.now_s, rest[0], verb == "drain"))
            case "stop":
                cluster.handle(e.StopOrdered(cluster.now_s))
            case "finish":
                cluster.finish()
            case "controller":
                cluster.controller_up = rest[0] == "up"
            case "run":
                cluster.run(float(rest[0]))
            case _:
                raise AssertionError(f"unknown action {verb}")
    return cluster


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path: Path) -> None:
    actions, _, expected = path.read_text().partition("----\n")
    cluster = play(actions)
    assert replay(cluster.journal) == cluster.history, "replaying the journal must give the same state"
    transcript = "\n".join(cluster.log) + "\n"
    if os.environ.get("REGROW_REWRITE"):
        path.write_text(actions + "----\n" + transcript)
    else:
        assert transcript == expected


def test_there_are_stories() -> None:
    assert len(STORIES) >= 12
