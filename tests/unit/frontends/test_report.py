"""Summary, plot and report of a run."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from orchestrator import ledger
from orchestrator.core.status import FailureStatus, JobStatus, Phase
from orchestrator.frontends.local import Injected, Run
from orchestrator.frontends.plot import Mark, loss_plot
from orchestrator.frontends.report import render, write_report
from orchestrator.frontends.summary import EXIT_DIFFERS, compare, summarize, verdict

from .statuses import incident, status


def made(directory: Path, job: JobStatus, losses: list[float | None], samples: int = 2) -> Run:
    writer = ledger.Writer(directory / "ledger", 1, 0)
    for number, loss in enumerate(losses):
        writer.write(number + 1, range(number * 2, number * 2 + samples), loss)
    writer.close()
    return Run(directory, job, 1000.0, 12.3456, (Injected("node-2@step=40", 5.0, 41),), ("node-3@step=999",))


DONE = status(Phase.SUCCEEDED, step=3, incidents=(incident(1, over=True),))


def test_equal_runs(tmp_path: Path) -> None:
    run, other = made(tmp_path / "a", DONE, [3.0, 2.0, 1.0]), made(tmp_path / "b", DONE, [3.0, 2.0, 1.000001])
    compared = compare(run, other)
    assert compared.equal
    assert verdict(run, compared) == (0, "")
    summary = summarize(run, compared, "report.html")
    assert {key: summary[key] for key in ("samples_lost", "samples_repeated", "compared_steps", "equal")} == {
        "samples_lost": 0,
        "samples_repeated": 0,
        "compared_steps": 3,
        "equal": True,
    }
    assert summary["max_loss_difference"] == pytest.approx(1e-6, rel=1e-2)
    assert summary["incidents"] == [
        {
            "number": 1,
            "cause": "node-2 lost",
            "from": "dp_shard 2 x tp 2 on 4 nodes",
            "to": "dp_shard 2 on 2 nodes",
            "reason": "2 devices are left",
            "decision": "",
            "stages_s": {"detect": 0.5, "stop": 0.25, "launch": 2.25},
            "recovery_s": 3.0,
            "lost_steps": 2,
            "over": True,
        }
    ]
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    ("losses", "samples", "words"),
    [
        ([3.0, 2.0, 1.00002], 2, "2.0e-05"),
        ([3.0, 2.0], 2, "2 samples lost"),
        ([3.0, 2.0, 1.0, 0.5], 2, "2 repeated"),
        ([3.0, 2.0, 1.0], 1, "3 samples lost"),
        ([3.0, 2.0, None], 2, "2 losses compared over 3 and 3 steps"),
        ([3.0, 2.0, math.nan], 2, "inf"),
        ([], 2, "0 losses compared"),
    ],
)
def test_differing_runs(tmp_path: Path, losses: list[float | None], samples: int, words: str) -> None:
    run, other = made(tmp_path / "a", DONE, losses, samples), made(tmp_path / "b", DONE, [3.0, 2.0, 1.0])
    compared = compare(run, other)
    code, sentence = verdict(run, compared)
    assert code == EXIT_DIFFERS
    assert words in sentence
    json.dumps(summarize(run, compared, ""), allow_nan=False)


def test_two_runs_without_losses_prove_nothing(tmp_path: Path) -> None:
    run, other = made(tmp_path / "a", DONE, [None, None]), made(tmp_path / "b", DONE, [None, None])
    assert not compare(run, other).equal


def test_a_failed_job(tmp_path: Path) -> None:
    failure = FailureStatus("ValueError: boom", "node-1", 0, "Traceback")
    run = made(tmp_path, status(Phase.FAILED, step=2, failure=failure), [1.0])
    assert verdict(run, None) == (7, "job gpt ended as FAILED at step 2: ValueError: boom")
    summary = summarize(run, None, "")
    assert summary["failure"]["traceback"] == "Traceback"
    assert summary["max_loss_difference"] is None
    assert "Traceback" in render(run, None, summary, "x")


class Page(HTMLParser):
    """Collects what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]


def test_the_report_stands_alone_and_escapes(tmp_path: Path) -> None:
    job = status(Phase.SUCCEEDED, step=3, incidents=(incident(1, over=True, cause="<script>alert(1)</script>"),))
    run, other = made(tmp_path / "a", job, [3.0, 2.0, 1.0]), made(tmp_path / "b", job, [3.0, 2.0, 1.0])
    compared = compare(run, other)
    path = write_report(run, other, summarize(run, compared, ""), compared.sentence)
    page = Page()
    page.feed(path.read_text())
    assert page.fetched == []
    assert "script" not in page.tags
    assert page.tags.count("polyline") == 4  # two curves, two entries of the legend
    for words in ("All 3 losses equal", "node-2@step=40 after 5.0 s, at step 41", "node-3@step=999: never"):
        assert words in path.read_text()


def test_the_plot_draws_every_curve_and_mark() -> None:
    curve = {step: 5.0 / step for step in range(1, 5001)}
    root = ElementTree.fromstring(loss_plot(curve, {1: 5.0, 2: math.nan}, [Mark(40, "1", 'a "<b>" & c')]))
    # The legend comes last: reversed, a curve takes the place of its entry.
    lines = {line.get("class"): line.get("points", "") for line in reversed(root.findall("polyline"))}
    assert 1000 < len(lines["run"].split()) <= 1500
    assert len(lines["undisturbed"].split()) == 1
    titles = [title.text for title in root.iter("title")]
    assert titles == ['a "<b>" & c']
    ticks = [text.text for text in root.findall("text")]
    assert {"1000", "5000", "step", "loss"} <= set(ticks)


@pytest.mark.parametrize("curve", [{}, {1: math.nan}])
def test_a_plot_without_losses(curve: dict[int, float]) -> None:
    assert "No loss" in loss_plot(curve, {}, [])


def test_a_flat_curve_has_room() -> None:
    ElementTree.fromstring(loss_plot({1: 0.0}, {}, []))
