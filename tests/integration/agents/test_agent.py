"""The agent as a program: size, command line, refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.integration.agents.conftest import Cluster, agent
from tests.integration.agents.scripted import TOKEN, ScriptedController

LIMIT_BYTES = 60_000_000


def test_agent_stays_small_without_torch(cluster: Cluster) -> None:
    number = cluster.start({"node-0": 2}, "steps.py").generation.number
    cluster.controller.training("node-0", number, 2)
    process = psutil.Process(cluster.agents["node-0"].pid)
    assert process.memory_info().rss < LIMIT_BYTES
    assert not [found.path for found in process.memory_maps() if "libtorch" in found.path]
    report = cluster.controller.report("node-0")
    assert 0 < report.probes.agent_rss_bytes < LIMIT_BYTES
    assert report.probes.memory_total_bytes == psutil.virtual_memory().total
    assert report.devices == 2


def run_agent(*flags: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "REGROW_TOKEN"}
    if token is not None:
        environment["REGROW_TOKEN"] = token
    command = [sys.executable, "-m", "agents", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_wrong_token_ends_the_agent(tmp_path: Path) -> None:
    controller = ScriptedController()
    token = tmp_path / "token"
    token.write_text("guessed\n")
    done = run_agent(
        "--controller", controller.url, "--node", "n", "--token-file", str(token), "--runtime-dir", str(tmp_path)
    )
    controller.close()
    assert done.returncode == 5
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the controller at http://127.0.0.1")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "token", "words"),
    [
        (("--node", "n"), TOKEN, "--controller"),
        (("--controller", "127.0.0.1:80", "--node", "n"), TOKEN, "http://HOST:PORT"),
        (("--controller", "http://127.0.0.1:1", "--node", "n"), None, "REGROW_TOKEN"),
        (("--controller", "http://127.0.0.1:1", "--node", "n", "--runtime-dir", "/proc/none"), TOKEN, "/proc/none"),
    ],
)
def test_bad_command_line_is_one_sentence(flags: tuple[str, ...], token: str | None, words: str) -> None:
    done = run_agent(*flags, token=token)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_second_agent_of_one_name_replaces_the_first(tmp_path: Path) -> None:
    controller = ScriptedController()
    with agent(controller, "twin", tmp_path / "first", "--preload", "") as first:
        controller.wait("first agent", lambda: controller.report("twin"))
        with agent(controller, "twin", tmp_path / "second", "--preload", "") as second:
            assert first.wait(30.0) == 4
            assert second.poll() is None
    controller.close()
