"""The command line: help, errors and exit codes; and its conversation with a real `regrow serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.sync.client import connect

from orchestrator import wire
from orchestrator.cli import main
from orchestrator.cli.plan import capacity_of
from orchestrator.core.types import NodeReport

COMMANDS = ["run", "serve", "agent", "submit", "status", "drain", "undrain", "save", "stop", "plan", "simulate"]
CHECKPOINT = [["checkpoint", "inspect"], ["checkpoint", "verify"]]
JOB = """
apiVersion: regrow.dev/v1alpha1
kind: TrainingJob
metadata: {name: it}
spec:
  entrypoint: {script: train.py}
  nodes: {min: 2, max: 4}
  batch: {global: 8}
  model: {layers: 4, hidden: 64, heads: 8, kvHeads: 4, ffnHidden: 192, vocab: 256, seqLength: 32}
  checkpoint: {uri: checkpoints}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "train.py").touch()
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("REGROW_TOKEN", "REGROW_URL", "REGROW_TOKEN_FILE", "REGROW_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def failed(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The one sentence on standard error of a command that must end with this exit code."""
    assert main(arguments) == code
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("regrow: ")
    assert errors.count("\n") == 1, errors
    return errors


@pytest.mark.parametrize("command", [[name] for name in COMMANDS if name != "agent"] + CHECKPOINT)
def test_every_command_has_help_with_an_example_and_exit_codes(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Example: regrow {' '.join(command)}" in text
    assert "--json" in text
    assert "Exit codes: 0 success" in text


def test_the_root_lists_every_command_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*COMMANDS, "checkpoint"])
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "0.1.0\n"


def test_help_is_fast_because_nothing_heavy_is_imported() -> None:
    code = "import sys; from orchestrator.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    heavy = {"torch", "numpy", "pydantic", "uvicorn", "starlette", "httpx2", "jinja2", "structlog", "yaml", "psutil"}
    assert not loaded & heavy


@pytest.mark.parametrize("command", [[name] for name in COMMANDS] + CHECKPOINT)
def test_an_unknown_flag_is_named(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *command, "--bogus"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--bogus" in done.stderr or "requires" in done.stderr or "required" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "bogus"),
        (["run"], "JOB"),
        (["run", "nope.yaml"], "nope.yaml"),
        (["run", "job.yaml", "--nodes", "0"], "--nodes '0'"),
        (["run", "job.yaml", "--nodes", "four"], "--nodes 'four'"),
        (["run", "job.yaml", "--nodes", "4x"], "--nodes '4x'"),
        (["run", "job.yaml", "--seed", "-1"], "--seed"),
        (["run", "job.yaml", "--fail", "node-7@step=3"], "the nodes are node-0, node-1, node-2, node-3"),
        (["run", "job.yaml", "--return", "node-2@step=3"], "never lost"),
        (["run", "job.yaml", "--runs-dir", "job.yaml"], "--runs-dir"),
        (["serve"], "REGROW_TOKEN"),
        (["serve", "--token-file", "no/such/folder"], "no/such/folder"),
        (["status"], "REGROW_TOKEN"),
        (["status", "--token-file", "nope"], "nope"),
        (["status", "--token-file", "job.yaml"], "characters"),
        (["submit", "nope.yaml"], "nope.yaml"),
        (["plan", "job.yaml"], "--nodes"),
        (["plan", "job.yaml", "--nodes", "7x"], "--nodes '7x'"),
        (["plan", "job.yaml", "--nodes", "7x8:tpu"], "'tpu'"),
        (["plan", "job.yaml", "--nodes", "7x8:h100/"], "for example 7x8:h100 or 7x8:h100/rack-a"),
        (["plan", "job.yaml", "--nodes", "7x8:h100/rack a"], "for example 7x8:h100 or 7x8:h100/rack-a"),
        (["plan", "job.yaml", "--nodes", "2x1", "--lose", "2"], "leave at least one"),
        (["plan", "job.yaml", "--nodes", "2x1", "--lose", "node-9"], "'node-9'"),
        (["plan", "job.yaml", "--nodes", "1x1"], "1 more node"),
        (["checkpoint", "convert", "a", "b", "--ranks", "2"], "--ranks is for --to native, not for --to universal"),
        (["checkpoint", "convert", "a", "b", "--to", "native", "--ranks", "0"], "--ranks 0 is none"),
        (["checkpoint", "convert", "a", "b", "--to", "dcp", "--stage", "3"], "--stage is for --to deepspeed-universal"),
        (["checkpoint", "convert", "a", "b", "--memory", "some"], "'some' is not an amount of memory"),
    ],
)
def test_wrong_input(job: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in failed(capsys, 2, *arguments)
    assert not Path("runs").exists()


def test_other_errors_have_their_own_exit_code(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGROW_TOKEN", "x")
    assert "no controller answers" in failed(capsys, 6, "status", "--url", "http://127.0.0.1:1")
    assert "is no address" in failed(capsys, 2, "status", "--url", "http://[")
    assert "holds no checkpoint of a known format" in failed(capsys, 3, "checkpoint", "verify", str(job.parent))
    assert "holds no checkpoint" in failed(capsys, 3, "checkpoint", "inspect", "job.yaml")
    assert "listen" in failed(capsys, 4, "serve", "--host", "192.0.2.1")
    assert "--fd" in failed(capsys, 2, "serve", "--fd", "999")


def test_a_defect_is_one_sentence_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("over\nnothing")

    monkeypatch.setattr("orchestrator.settings.load", broken)
    assert "ZeroDivisionError: over nothing" in failed(capsys, 1, "status")
    monkeypatch.setenv("REGROW_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["status"])


def test_plans_are_ranked_and_follow_losses(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "job.yaml", "--nodes", "3x1", "--lose", "node-2", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["rounds"]
    assert [node["node"] for node in second["assignment"]["nodes"]] == ["node-0", "node-1"]
    assert (first["when"], second["when"]) == ("at first", "without node-2")
    assert first["plan"]["reason"]
    assert first["alternatives"]
    job.write_text(JOB.replace("{global: 8}", "{global: 96}"))  # enough for a third node to be worth its collectives
    assert main(["plan", "job.yaml", "--nodes", "2x1,1x1:cpu"]) == 0
    assert "at first: dp_shard 3" in capsys.readouterr().out


def test_slow_nodes_are_planned_with_smaller_shares(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = JOB.replace("{global: 8}", "{global: 960}").replace("layers: 4, hidden: 64", "layers: 32, hidden: 4096")
    job.write_text(large.replace("seqLength: 32", "seqLength: 2048") + "  parallelism: {pp: 1}\n")
    assert main(["plan", "job.yaml", "--nodes", "3x8:h100,1x8:h100@0.5", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["rounds"]
    samples = found["plan"]["batch"]["samples"]
    assert sum(samples) == 960 and min(samples) < max(samples) - 1
    assert found["assignment"]["nodes"][-1]["node"] == "node-3"
    assert "cannot be read" in failed(capsys, 2, "plan", "job.yaml", "--nodes", "1x8:h100@1.5")
    assert "speed 0" in failed(capsys, 2, "plan", "job.yaml", "--nodes", "1x8:h100@.0")


def test_nodes_are_told_their_racks() -> None:
    found = capacity_of("2x8:h100/rack-a,1x8:h100@0.5/b.2,1x4/c,1")
    assert [(node.kind, node.devices, node.speed, node.rack) for node in found] == [
        *2 * [("h100", 8, 1.0, "rack-a")],
        ("h100", 8, 0.5, "b.2"),
        ("cpu", 4, 1.0, "c"),
        ("cpu", 1, 1.0, ""),
    ]


LARGE = """
apiVersion: regrow.dev/v1alpha1
kind: TrainingJob
metadata: {name: large}
spec:
  entrypoint: {script: train.py}
  nodes: {min: 2, max: 4}
  batch: {global: 64}
  model: {layers: 32, hidden: 4096, heads: 32, kvHeads: 8, ffnHidden: 14336, vocab: 128256, seqLength: 8192}
  parallelism: {cp: {max: 2}, interleave: {max: 2}, zero: {min: 2}}
  checkpoint: {uri: checkpoints}
"""


def test_terms_and_the_ladder_are_shown_in_a_hundred_columns(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    job.write_text(LARGE)
    assert main(["plan", "job.yaml", "--nodes", "4x8:h100", "--ladder", "3"]) == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 100
    for words in ("tokens/s", "MFU", "step, seconds", "memory, GiB", "states", " lost by ", "more with --json"):
        assert words in shown
    assert "3     none" in shown
    assert "3 lost: 1 node with devices is available but the job needs 2" in shown


def test_every_term_and_rung_is_in_the_json(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.write_text(LARGE)
    assert main(["plan", "job.yaml", "--nodes", "4x8:h100", "--ladder", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    for one in [answer["rounds"][0]["chosen"], *answer["rounds"][0]["alternatives"]]:
        assert sum(one["seconds"].values()) == pytest.approx(one["step_s"])
        assert sum(one["memory"].values()) == pytest.approx(one["memory_bytes"])
        assert one["tokens_per_s"] == pytest.approx(64 * 8192 / one["step_s"])
        assert 0 < one["mfu"] < 1
    assert [rung["lost"] for rung in answer["ladder"]] == [1, 2, 3]
    assert answer["ladder"][2]["needs"] == "1 more node"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("zero: 4", "spec.parallelism.zero (4) is more than 3"),
        ("interleave: {max: 4, prefer: 2}", "spec.parallelism.interleave.prefer is not known"),
    ],
)
def test_what_is_no_axis_has_no_preference(job: Path, capsys: pytest.CaptureFixture[str], line: str, said: str) -> None:
    job.write_text(LARGE.replace("cp: {max: 2}, interleave: {max: 2}, zero: {min: 2}", line))
    assert said in failed(capsys, 2, "plan", "job.yaml", "--nodes", "4x8:h100")


TOKEN = "sesame"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a real controller; `REGROW_URL` and `REGROW_TOKEN` are set."""
    monkeypatch.setenv("REGROW_TOKEN", TOKEN)
    command = [sys.executable, "-m", "orchestrator.cli", "serve", "--port", "0", "--json"]
    with (
        (tmp_path / "serve.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        url: str = json.loads(process.stdout.readline())["url"]
        monkeypatch.setenv("REGROW_URL", url)
        yield url
        process.terminate()
        assert process.wait(timeout=30) == 0


def test_a_job_from_submission_to_stop(job: Path, served: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no job yet" in failed(capsys, 2, "status")
    assert main(["submit", "job.yaml"]) == 0
    assert capsys.readouterr().out.startswith("job it is accepted")
    assert "is active" in failed(capsys, 4, "submit", "job.yaml")
    assert "no job is called other" in failed(capsys, 2, "status", "other")
    assert "no GET /v1/jobs/a/b here" in failed(capsys, 2, "status", "a/b")
    assert "its nodes are none yet" in failed(capsys, 2, "drain", "node-1")

    headers = {"Authorization": f"Bearer {TOKEN}"}
    with connect(served.replace("http", "ws") + "/v1/agents?node=node-1", additional_headers=headers) as agent:
        agent.send(wire.pack(report=NodeReport("node-1", "a", "127.0.0.1", 1)))
        agent.recv(timeout=20)
        assert "its nodes are node-1" in failed(capsys, 2, "drain", "node-9")
        assert main(["drain", "node-1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"name": "it", "node": "node-1", "drained": True}
        assert main(["status"]) == 0
        assert "drained" in capsys.readouterr().out
        assert main(["undrain", "node-1"]) == 0
        capsys.readouterr()
        assert main(["status", "it", "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert [(node["node"], node["drained"]) for node in status["nodes"]] == [("node-1", False)]
        assert status["phase"] == "WAITING"

    assert main(["save"]) == 0
    assert main(["stop"]) == 0
    capsys.readouterr()
    watch = [sys.executable, "-m", "orchestrator.cli", "status", "--watch", "--json"]
    done = subprocess.run(watch, capture_output=True, text=True, check=False, timeout=60)
    last = json.loads(done.stdout.splitlines()[-1])
    assert done.stderr == ""
    assert last["phase"] in {"SUCCEEDED", "FAILED"}
    assert done.returncode == (7 if last["phase"] == "FAILED" else 0)


def test_a_wrong_token_is_refused(served: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("guess\n")
    assert "token" in failed(capsys, 5, "status", "--token-file", "wrong")
    assert "token" in failed(capsys, 5, "stop", "--token-file", "wrong")


def test_the_agent_command_becomes_the_agent() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "agent", "--help"], capture_output=True, text=True, check=True
    )
    assert "--controller" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "agent", "--controller", "http://127.0.0.1:1", "--node", "n"],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "REGROW_TOKEN"},
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
