"""Trains the example in real ranks that are forked from one process with torch already imported, as an agent's are.

Run as a program: every line of stdin is a launch as JSON, every line of stdout its outcome.

    {"orders": [paths of launch orders to train one after the other in the same processes], "arguments": [[...], ...],
     "ledgers": [...], "requests": [[step, rank, pause], ...]}
 -> {"exit_codes": [...], "messages": [[rank, {...}], ...], "log": "what the ranks printed"}

The launching process is the ranks' agent: it listens on their unix socket and sends a save request to `rank` once any
rank has completed `step` steps. Everything is done by one thread, because it forks.
"""

from __future__ import annotations

import json
import os
import runpy
import selectors
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "gpt"
DEADLINE_S = 240.0


def rank_main(launch: dict[str, Any], environment: dict[str, str]) -> None:
    """One worker: trains every order of the launch in turn."""
    os.environ.update(environment)
    sys.path.insert(0, str(EXAMPLE))
    for order, arguments, ledger in zip(launch["orders"], launch["arguments"], launch["ledgers"], strict=True):
        os.environ.update(REGROW_ORDER=order, REGROW_LEDGER=ledger)
        sys.argv = ["train.py", *arguments]
        runpy.run_path(str(EXAMPLE / "train.py"), run_name="__main__")


def fork_rank(launch: dict[str, Any], environment: dict[str, str], log: int) -> int:
    if (pid := os.fork()) != 0:
        return pid
    code = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        rank_main(launch, environment)
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Agent:
    """The other end of the ranks' unix socket."""

    def __init__(self, path: Path, requests: list[tuple[int, int, bool]]) -> None:
        self.messages: list[tuple[int, dict[str, Any]]] = []
        self._requests = sorted(requests)
        self._sent = 0
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._buffers: dict[socket.socket, bytes] = {}
        self._ranks: dict[int, socket.socket] = {}

    def poll(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                self._buffers[connection] = b""
                self._selector.register(connection, selectors.EVENT_READ)
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._read(key.fileobj)

    def _read(self, connection: socket.socket) -> None:
        data = connection.recv(1 << 16)
        if not data:
            self._selector.unregister(connection)
            connection.close()
            return
        *lines, self._buffers[connection] = (self._buffers[connection] + data).split(b"\n")
        for line in lines:
            self._take(connection, json.loads(line))

    def _take(self, connection: socket.socket, message: dict[str, Any]) -> None:
        if message["type"] == "hello":
            self._ranks[message["rank"]] = connection
        rank = next(number for number, known in self._ranks.items() if known is connection)
        self.messages.append((rank, message))
        while self._requests and message["type"] == "progress" and message["step"] >= self._requests[0][0]:
            _, target, pause = self._requests.pop(0)
            self._sent += 1
            line = json.dumps({"type": "save", "request": self._sent, "pause": pause}) + "\n"
            self._ranks[target].sendall(line.encode())


def run_ranks(launch: dict[str, Any], folder: Path) -> dict[str, Any]:
    from torch.distributed import TCPStore

    from orchestrator import wire
    from orchestrator.core.types import LaunchOrder

    order: LaunchOrder = wire.loads(Path(launch["orders"][0]).read_text(), LaunchOrder)
    size = order.generation.plan.mesh.world_size
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = Agent(folder / "agent.sock", [tuple(request) for request in launch.get("requests", [])])
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    pids = []
    for rank in range(size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "REGROW_SOCKET": str(folder / "agent.sock"),
        }
        pids.append(fork_rank(launch, environment, log))
    codes = wait_for(pids, agent)
    agent.poll(0.0)
    return {"exit_codes": codes, "messages": agent.messages, "log": (folder / "log").read_text()}


def wait_for(pids: list[int], agent: Agent) -> list[int]:
    """Exit codes; when one rank fails or the deadline passes, the others are killed."""
    deadline = time.monotonic() + DEADLINE_S
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        agent.poll(0.02)
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        if any(codes.values()) or time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, 9)
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for _ in range(100):  # what the ranks said last
        agent.poll(0.0)
    return [codes[pid] for pid in pids]


def main() -> None:
    from orchestrator.trainer.preload import preload

    preload()
    for line in sys.stdin:
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            print(json.dumps(run_ranks(json.loads(line), Path(folder))), flush=True)


if __name__ == "__main__":
    main()
