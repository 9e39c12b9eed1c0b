"""Two warm agents with two devices each, shared by all tests of this folder: warming one up takes seconds."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from orchestrator.core.types import Directive, LaunchOrder
from tests.integration.agents.scripted import TOKEN, ScriptedController, make_order

SCRIPTS = Path(__file__).with_name("scripts")


@contextmanager
def agent(controller: ScriptedController, node: str, directory: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run an agent until the end of the block."""
    command = [sys.executable, "-m", "agents", "--controller", controller.url, "--node", node]
    command += ["--runtime-dir", str(directory), "--parent", str(os.getpid()), *flags]
    with (directory.parent / f"{node}.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env=os.environ | {"REGROW_TOKEN": TOKEN})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Cluster:
    """The shared agents `node-0` and `node-1`, and the generations run on them."""

    nodes = ("node-0", "node-1")

    def __init__(self, controller: ScriptedController, directory: Path) -> None:
        self.controller = controller
        self.directory = directory
        self.numbers = itertools.count(1)
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, nodes: dict[str, int], script: str, *args: str, **more: dict[str, str]) -> LaunchOrder:
        """Order the next generation."""
        order = make_order(next(self.numbers), nodes, SCRIPTS / script, *args, **more)
        self.controller.order(order)
        return order

    def stop(self) -> None:
        """Have nothing run."""
        number = next(self.numbers)
        for node in self.nodes:
            self.controller.direct(node, Directive(number, heartbeat_s=0.5))
        for node in self.nodes:
            self.controller.wait("end", lambda node=node: self._idle(node))

    def _idle(self, node: str) -> bool:
        report = self.controller.report(node)
        return report is not None and (
            report.launch is None or not any(w.exit_code is None for w in report.launch.workers)
        )

    def wait_warm(self) -> None:
        for node in self.nodes:
            self.controller.wait("warm agent", lambda node=node: (r := self.controller.report(node)) and r.warm)

    def log(self, node: str, generation: int, rank: int) -> str:
        return (self.directory / node / f"generation-{generation:04}" / f"worker-{rank}.log").read_text()

    def child(self, node: str, generation: int, rank: int) -> tuple[psutil.Process, psutil.Process]:
        """The two children that the script `steps.py fork` says it has: forked, and in a session of its own."""
        (pids,) = re.findall(r"children (\d+) (\d+)", self.log(node, generation, rank))
        return psutil.Process(int(pids[0])), psutil.Process(int(pids[1]))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(ScriptedController(), directory)
    with (
        agent(cluster.controller, "node-0", directory / "node-0", "--devices", "2") as first,
        agent(cluster.controller, "node-1", directory / "node-1", "--devices", "2") as second,
    ):
        cluster.agents = {"node-0": first, "node-1": second}
        cluster.wait_warm()
        yield cluster
    cluster.controller.close()


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """The shared agents with nothing running, before and after."""
    shared.wait_warm()
    yield shared
    shared.stop()
