"""The processes of a local run: one controller and one agent per node, kept alive as a service manager would."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from orchestrator.core.errors import RegrowError
from orchestrator.frontends.children import Child, kill, reap, sweep
from orchestrator.server.serving import listen

RESTART_AFTER_S = 0.5
"""How long a crashed controller or agent stays down."""
SHORT_LIFE_S = 3.0
MAX_SHORT_LIVES = 5
"""So many lives in a row that were shorter than `SHORT_LIFE_S`, none of them ended by a signal, are a defect."""
GRACE_S = 5.0
"""How long processes may take to end when asked to."""


class Cluster:
    """Controller and agents on 127.0.0.1, with a token of their own; nodes are called `node-0` and so on."""

    def __init__(self, nodes: Mapping[str, int], directory: Path, say: Callable[[str], None]) -> None:
        self.token = secrets.token_urlsafe(24)
        self._say = say
        # Held here, not by the controller: its address outlives it, and connections wait while it is started again.
        self._listener: socket.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        environment = dict(os.environ) | {"REGROW_TOKEN": self.token, "REGROW_URL": self.url, "PYTHONUNBUFFERED": "1"}
        environment["REGROW_LEDGER"] = str(ledger_of(directory))  # workers inherit it from their agent
        logs = directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        descriptor = self._listener.fileno()
        serve = [sys.executable, "-m", "orchestrator.cli", "serve"]
        serve += ["--journal", str(directory / "journal.sqlite3"), "--fd", str(descriptor)]
        self.controller = Child("controller", serve, environment, logs / "controller.log", [descriptor])
        self.agents = {
            node: Child(
                f"agent of {node}", agent_command(self.url, node, devices, directory), environment, logs / f"{node}.log"
            )
            for node, devices in nodes.items()
        }
        self.away: set[str] = set()
        """Nodes lost by a fault that have not returned."""
        self._down_since: dict[str, float] = {}
        self._short_lives: dict[str, int] = {}

    def start(self) -> None:
        """Start everything."""
        for child in self._children():
            child.start()

    def poll(self) -> None:
        """Start again what has died, except lost nodes; raises `RegrowError` when something dies over and over."""
        reap(keep=[child.pid for child in self._children() if child.pid is not None])
        now_s = time.monotonic()
        for node, child in [("", self.controller), *self.agents.items()]:
            if node in self.away or child.alive:
                continue
            since_s = self._down_since.setdefault(child.name, now_s)
            if since_s == now_s:
                self._died(child)
            if now_s - since_s >= RESTART_AFTER_S:
                del self._down_since[child.name]
                self._say(f"{child.name} is started again")
                child.start()

    def _died(self, child: Child) -> None:
        self._say(f"{child.name} ended with status {child.exit_code}")
        deliberate = child.age_s >= SHORT_LIFE_S or (child.exit_code or 0) < 0
        lives = self._short_lives[child.name] = 0 if deliberate else self._short_lives.get(child.name, 0) + 1
        if lives >= MAX_SHORT_LIVES:
            raise RegrowError(
                f"the {child.name} ended {lives} times in a row right after its start: {child.last_words()}; "
                f"see {child.log}"
            )

    def lose(self, node: str) -> None:
        """The node loses power: agent and workers are gone until `bring_back`."""
        self.away.add(node)
        self._down_since.pop(self.agents[node].name, None)
        self.agents[node].kill()

    def bring_back(self, node: str) -> None:
        """A lost node starts again."""
        self.away.discard(node)
        self.agents[node].start()

    def crash(self, node: str | None) -> None:
        """SIGKILL of one agent, or of the controller (None); it is started again."""
        child = self.controller if node is None else self.agents[node]
        child.send(signal.SIGKILL)

    def signal_worker(self, node: str, pids: tuple[int, ...], number: signal.Signals) -> int | None:
        """Signal the first of the workers `pids` that really lives on the node; its pid, or None when none does."""
        alive = {process.pid: process for process in self.agents[node].descendants()}
        for pid in pids:
            if pid in alive:
                try:
                    alive[pid].send_signal(number)
                except psutil.NoSuchProcess:
                    continue
                return pid
        return None

    def stop(self) -> None:
        """End everything: agents first (they stop their workers), then the controller; nothing is left behind."""
        agents = [child for child in self.agents.values() if child.alive]
        below = [process for child in agents for process in child.descendants()]
        _end(agents)
        kill(below)
        _end([self.controller])
        self._listener.close()
        if left := sweep():
            raise RegrowError(
                f"processes {', '.join(str(one.pid) for one in left)} could not be killed: end them by hand"
            )

    def _children(self) -> list[Child]:
        return [self.controller, *self.agents.values()]


def ledger_of(directory: Path) -> Path:
    """Where the workers of a run write down the samples they consume and their losses."""
    return directory / "ledger"


def agent_command(url: str, node: str, devices: int, directory: Path) -> list[str]:
    """The agent of one local node; the token is in the environment."""
    command = [sys.executable, "-m", "agents", "--controller", url, "--node", node, "--devices", str(devices)]
    return [*command, "--address", "127.0.0.1", "--runtime-dir", str(directory / "nodes" / node)]


def _end(children: list[Child]) -> None:
    """SIGTERM, and SIGKILL for whoever takes longer than `GRACE_S`."""
    for child in children:
        child.send(signal.SIGTERM)
    end_s = time.monotonic() + GRACE_S
    while any(child.alive for child in children) and time.monotonic() < end_s:
        time.sleep(0.02)
    for child in children:
        if child.alive:
            child.kill()
