"""`regrow run`, `serve` and `status` as a person starts them: real processes, their output and their exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .harness import JobOptions, family, regrow

SLEEPER = "import time\ntime.sleep(600)\n"
BROKEN = "import os\nraise ValueError('the data is gone')\n"


def until(condition: Callable[[], object], deadline_s: float = 60.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.02)


def written(folder: Path, options: JobOptions, script: str | None = None) -> str:
    """The path of a job file; with `script`, it runs that instead of the example."""
    if script is not None:
        path = folder / "script.py"
        path.write_text(script)
        options = JobOptions(script=path, args=(), max_nodes=options.max_nodes, min_nodes=options.min_nodes)
    job = folder / "job.yaml"
    job.write_text(options.text(folder))
    return str(job)


def waiting_run(tmp_path: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run whose job never ends, once its workers exist; with all its processes."""
    job = written(tmp_path, JobOptions(max_nodes=2), SLEEPER)
    run = regrow("run", job, "--nodes", "2", "--runs-dir", str(tmp_path / "runs"))
    logs = tmp_path / "runs" / "it-1" / "nodes"
    until(lambda: len(list(logs.glob("node-*/generation-*/worker-*.log"))) == 2)
    return run, family(run)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run, processes = waiting_run(tmp_path)
    assert len(processes) >= 5  # controller, two agents and what they run
    run.send_signal(number)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == code
    assert errors.strip() == f"regrow: stopped by {number.name}: all processes of the run were ended"
    assert not [one for one in processes if one.is_running()]
    assert "generation 1" in output


def test_kill_9_of_the_command_ends_everything(tmp_path: Path) -> None:
    run, processes = waiting_run(tmp_path)
    run.kill()
    run.communicate(timeout=60)
    until(lambda: not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE])


def test_a_script_that_raises_fails_the_job_with_its_traceback(tmp_path: Path) -> None:
    job = written(tmp_path, JobOptions(max_nodes=2), BROKEN)
    run = regrow("run", job, "--nodes", "2", "--runs-dir", str(tmp_path / "runs"), "--compare", "--json")
    output, errors = run.communicate(timeout=180)
    assert run.returncode == 7
    summary = json.loads(output)
    assert summary["phase"] == "FAILED"
    assert "ValueError: the data is gone" in summary["failure"]["traceback"]
    last = errors.strip().splitlines()[-1]
    assert last.startswith("regrow: job it ended as FAILED")
    assert "the data is gone" in last


IMPATIENT = """
import sys
import orchestrator.frontends.local as local
from orchestrator.cli import main
local.STUCK_AFTER_S = 1.0
sys.exit(main())
"""


def test_too_few_nodes_wait_with_a_reason_and_are_given_up_when_none_can_come(tmp_path: Path) -> None:
    job = written(tmp_path, JobOptions(min_nodes=3, max_nodes=4), SLEEPER)
    command = [sys.executable, "-c", IMPATIENT, "run", job, "--nodes", "2", "--runs-dir", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 7
    assert "WAITING: " in done.stdout
    assert "no node can join any more" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_faults_compared_with_an_undisturbed_run(tmp_path: Path) -> None:
    job = written(tmp_path, JobOptions(steps=30, max_nodes=3))
    arguments = ["--nodes", "3", "--runs-dir", str(tmp_path / "runs"), "--compare", "--json", "--seed", "5"]
    faults = ["--fail", "node-2@step=8", "--return", "node-2@t=1", "--fail", "worker:node-1@step=20"]
    run = regrow("run", job, *arguments, *faults)
    output, errors = run.communicate(timeout=280)
    assert run.returncode == 0, errors
    summary = json.loads(output)
    assert summary["phase"] == "SUCCEEDED"
    assert summary["step"] == 30
    assert summary["faults_never_due"] == []
    assert [one["fault"] for one in summary["faults"]] == ["node-2@step=8", "node-2@t=1", "worker:node-1@step=20"]
    assert len(summary["incidents"]) >= 2
    assert "node-2 lost" in summary["incidents"][0]["cause"]
    assert summary["incidents"][0]["to"].endswith("on 2 nodes")
    assert summary["max_loss_difference"] <= 1e-5
    assert (summary["samples_lost"], summary["samples_repeated"], summary["compared_steps"]) == (0, 0, 30)
    assert "<svg" in Path(summary["report"]).read_text()
    assert not Path(tmp_path / "checkpoints").exists()  # the job file's own folder stays untouched


def test_a_second_controller_on_the_same_journal(tmp_path: Path) -> None:
    arguments = ["--port", "0", "--journal", str(tmp_path / "journal"), "--token-file", str(tmp_path / "token")]
    first = regrow("serve", *arguments, "--json")
    try:
        assert first.stdout is not None
        url = json.loads(first.stdout.readline())["url"]
        assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
        second = regrow("serve", *arguments)
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 4
        assert errors.count("\n") == 1
        assert "journal" in errors
        status = regrow("status", "--url", url, "--token-file", str(tmp_path / "token"))
        _, errors = status.communicate(timeout=60)
        assert (status.returncode, "no job" in errors) == (2, True)
        first.terminate()
        assert first.wait(timeout=60) == 0
    finally:
        first.kill()
        first.communicate()
