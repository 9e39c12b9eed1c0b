"""`regrow simulate`: the same report for the same seeds, and one sentence for what cannot be simulated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cli import main

JOB = """
apiVersion: regrow.dev/v1alpha1
kind: TrainingJob
metadata: {name: small}
spec:
  entrypoint: {script: train.py}
  nodes: {min: 1, max: 64}
  batch: {global: 256}
  model: {layers: 32, hidden: 4096, heads: 32, kvHeads: 8, ffnHidden: 14336, vocab: 128256, seqLength: 8192}
  checkpoint: {uri: checkpoints}
"""


@pytest.fixture(autouse=True)
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    Path("job.yaml").write_text(JOB)


def simulate(*more: str) -> int:
    return main(["simulate", "job.yaml", "--nodes", "8x8:h100", "--days", "4", "--rate", "150", *more])


def test_all_policies_are_compared_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--seeds", "2", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    found = [one["policy"] for one in data["policies"]]
    assert set(found) == {"regrow", "baseline", "wait", "spares", "equal", "interval"}
    goodputs = [one["goodput"] for one in data["policies"]]
    assert goodputs == sorted(goodputs, reverse=True)
    assert len(data["runs"]) == 12 and data["devices"] == 64
    assert all(sum(one["shares"].values()) == pytest.approx(1) for one in data["policies"])


def test_the_same_seeds_give_the_same_report_byte_for_byte(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one.html", "two.html"):
        assert simulate("--seeds", "1", "--policy", "regrow", "--policy", "wait", "--report", name) == 0
    first, second = (Path(name).read_bytes() for name in ("one.html", "two.html"))
    assert first == second
    text = first.decode()
    assert text.count("<rect class=") >= 20 and "regrow" in text and "http" not in text.replace("http-equiv", "")
    printed = capsys.readouterr().out
    assert printed[: len(printed) // 2] == printed[len(printed) // 2 :] and "goodput" in printed


def test_a_trace_takes_the_place_of_failures(capsys: pytest.CaptureFixture[str]) -> None:
    Path("trace.csv").write_text("t_s,available_nodes\n0,8\n3600,5\n7200,8\n")
    wanted = ["simulate", "job.yaml", "--nodes", "8x8:h100", "--days", "1", "--trace", "trace.csv", "--seeds", "1"]
    assert main([*wanted, "--policy", "regrow"]) == 0
    assert "failures: trace.csv" in capsys.readouterr().out
    assert main([*wanted, "--rate", "3"]) == 2
    assert "leave out --failures, --rate and --repair-hours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--failures", "llama4"], "no failure model 'llama4': choose one of llama3"),
        (["--policy", "hope"], "no policy 'hope': choose one of regrow"),
        (["--trace", "none.csv"], "--trace says what happens to nodes"),
        (["--spares", "8"], "--spares is 8 of 8 nodes: leave some to train on"),
        (["--report", "no/where.html", "--seeds", "1", "--policy", "wait"], "--report no/where.html cannot be written"),
        (["--days", "0"], "--days"),
    ],
)
def test_what_cannot_be_simulated(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(*arguments) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and words in errors


def test_a_trace_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "job.yaml", "--nodes", "8x8:h100", "--trace", "none.csv"]) == 2
    assert "--trace none.csv cannot be read (No such file or directory): give a CSV file" in capsys.readouterr().err


def test_jobs_and_clusters_that_cannot_be_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "job.yaml", "--nodes", "8x8:h100,8x8:a100"]) == 2
    assert "all alike" in capsys.readouterr().err
    assert main(["simulate", "job.yaml", "--nodes", "8x1:v100"]) == 2
    assert "the job has no plan on these nodes" in capsys.readouterr().err
    Path("job.yaml").write_text("\n".join(line for line in JOB.splitlines() if "model:" not in line))
    assert main(["simulate", "job.yaml", "--nodes", "8x8:h100"]) == 2
    assert "give spec.model" in capsys.readouterr().err
