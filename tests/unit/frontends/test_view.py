from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console

from orchestrator.core.status import FailureStatus, Health, Phase, Rung, Verdict
from orchestrator.frontends.view import Lines, Screen, render

from .statuses import incident, node, plan, status


def shown(one: object) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(one)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(*statuses: object) -> list[str]:
    stream = io.StringIO()
    with Lines(stream) as view:
        for one in statuses:
            view.show(one)  # type: ignore[arg-type]
    return [re.sub(r"^\[ *\d+\.\d\d s\] ", "", line) for line in stream.getvalue().splitlines()]


def test_lines_say_only_what_is_new() -> None:
    running = status(step=1)
    assert lines(status(Phase.STARTING), running, running, status(step=9), status(step=10), status(step=19)) == [
        "STARTING: because",
        "generation 1: dp_shard 2 on 2 nodes",
        "RUNNING: because",
        "step 1  loss 2.50000  committed step -",
        "step 10  loss 2.50000  committed step -",
    ]


def test_lines_tell_incidents_once_and_their_end() -> None:
    before, during = status(step=42), status(Phase.STARTING, incidents=(incident(1, over=False),))
    after = status(step=41, generation=2, incidents=(incident(1, over=True),))
    said = lines(before, during, during, after, after)
    assert said.count("incident 1: node-2 lost") == 1
    over = [line for line in said if line.startswith("incident 1 is over")]
    assert over == ["incident 1 is over: dp_shard 2 x tp 2 on 4 nodes -> dp_shard 2 on 2 nodes, 3.00 s, 2 steps lost"]


def test_what_was_weighed_and_how_often_is_saved_are_told_once() -> None:
    weighed = incident(1, over=False, decision="shrink 90 s of useful training, against wait 0 s")
    every = status(saving="every 40 s: a save stalls training for 1 s")
    said = lines(every, replace(every, incidents=(weighed,)), replace(every, incidents=(weighed,)))
    assert said.count("incident 1: shrink 90 s of useful training, against wait 0 s") == 1
    assert said.count("checkpoints every 40 s: a save stalls training for 1 s") == 1
    text = shown(render(replace(every, incidents=(weighed,))))
    assert "shrink 90 s of useful training" in text and "checkpoints every 40 s" in text


def test_steps_are_told_again_after_a_setback() -> None:
    said = lines(status(step=60), status(step=42), status(step=50))
    assert [line.split("  ")[0] for line in said if line.startswith("step")] == ["step 60", "step 42", "step 50"]


def test_the_screen_shows_nodes_incidents_and_the_traceback() -> None:
    lost = node("node-3", None, verdict=Verdict(Health.LOST, "no heartbeat for 10 s"), drained=True)
    failure = FailureStatus("ValueError: boom", "node-1", 0, "Traceback ...\nValueError: boom\n")
    one = status(Phase.FAILED, step=3, incidents=(incident(1, over=True), incident(2, over=False)), failure=failure)
    text = shown(render(one.__class__(**{**_fields(one), "nodes": (*one.nodes, lost)})))
    for words in ("gpt", "FAILED", "node-1", "LOST drained", "no heartbeat for 10 s", "under way", "rank 0 on node-1"):
        assert words in text
    assert "Traceback ...\nValueError: boom" in re.sub(r" +\n", "\n", text)


def _fields(one: object) -> dict[str, object]:
    return {name: getattr(one, name) for name in one.__slots__}  # type: ignore[attr-defined]


def test_text_of_a_job_is_not_markup() -> None:
    assert "[bold]x[/nope]" in shown(render(status(reason="[bold]x[/nope]")))


def test_the_live_screen_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Screen(console) as view:
        view.show(status(step=1))
        view.say("fault 'node-2@step=40' [x]")
        view.show(status(Phase.SUCCEEDED, step=2))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "SUCCEEDED" in text
    assert "fault 'node-2@step=40' [x]" in text


def test_a_running_job_tells_what_would_follow_a_loss() -> None:
    running = replace(plan(dp_shard=2), step_s=1.0)
    rungs = (
        Rung(1, replace(plan(dp_shard=1), step_s=2.0), 1, "it fits"),
        Rung(2, None, 0, "the job needs 1 node"),
    )
    seen = shown(render(status(step=5, plan=running, ladder=rungs)))
    assert "ready for losses: 1 lost: 1 device on 1 node, 0.50x the speed; 2 lost: no legal plan" in " ".join(
        seen.split()
    )
    assert "ready for losses" not in shown(render(status(step=5)))


def test_racks_are_shown_where_a_node_says_one() -> None:
    assert "rack" not in shown(render(status()))
    text = shown(render(status(nodes=(node("node-1", 0, rack="[b]7"), node("node-2", 1)))))
    assert "rack" in text and "[b]7" in text


def test_the_speed_of_a_node_is_shown_where_it_says_one() -> None:
    assert "1/1 at" not in shown(render(status()))
    text = shown(render(status(nodes=(node("node-1", 0, speed=0.7), node("node-2", 1)))))
    assert text.count("1/1 at 0.7x") == text.count(" at ") == 1
