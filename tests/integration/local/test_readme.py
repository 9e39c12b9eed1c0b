"""What a newcomer copies from the README works as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[3] / "README.md").read_text()


def block(language: str, containing: str) -> str:
    """The fenced block of that language that holds the words."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in text]
    assert len(found) == 1
    return str(found[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The README's `train.py`, with fewer steps, and its `job.yaml`."""
    script = block("python", "session.track")
    assert "steps=400" in script
    (tmp_path / "train.py").write_text(script.replace("steps=400", "steps=30"))
    (tmp_path / "job.yaml").write_text(block("yaml", "kind: TrainingJob"))
    return tmp_path


def test_the_script_runs_alone(folder: Path) -> None:
    subprocess.run([sys.executable, "train.py"], cwd=folder, check=True, timeout=200)


def test_the_job_survives_a_loss(folder: Path) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "run", "job.yaml", "--nodes", "2", "--json"]
    command += ["--fail", "node-1@step=10"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [one["cause"].split()[0] for one in result["incidents"]] == ["node-1"]


def test_every_command_that_is_named_exists() -> None:
    named = set(re.findall(r"regrow ((?:checkpoint )?[a-z]+)", " ".join(re.findall(r"`(regrow [^`]*)`", README))))
    assert {"run", "serve", "checkpoint inspect", "plan"} <= named
    for words in sorted(named):
        command = [sys.executable, "-m", "orchestrator.cli", *words.split(), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (words, done.stderr)
        assert "Example" in done.stdout, words
