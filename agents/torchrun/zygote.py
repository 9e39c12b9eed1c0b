"""The warm process: imports torch once, then forks an elastic process for every launch.

`python -m agents.torchrun.zygote --commands FD --parent PID [--preload MODULE]`. On the socket FD it is told
`{"launch": {...}}` and answers `{"event": "warm"}`, `{"event": "launched", "pid": p}` and, once nothing of the launch
is alive any more, `{"event": "gone", "exit_code": c, "reaped": {pid: exit code}}`. It has one thread and uses no part
of torch that starts one, or its forks could hang.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import selectors
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from agents.processes import adopt_orphans, die_with_parent, kill_group, sweep
from orchestrator import wire
from orchestrator.core.types import (
    AssignedNode,
    Assignment,
    BatchSplit,
    Entrypoint,
    Generation,
    LaunchOrder,
    Mesh,
    Plan,
    WorkerError,
)

WARM_MODULES = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "agents.torchrun.elastic",
)


def main(argv: list[str]) -> None:
    """Import, then serve commands until the agent is gone."""
    parser = argparse.ArgumentParser(prog="python -m agents.torchrun.zygote")
    parser.add_argument("--commands", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--preload", default=None)
    options = parser.parse_args(argv)
    die_with_parent(options.parent)
    adopt_orphans()
    os.set_inheritable(options.commands, False)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warm_up(options.preload)
    Zygote(socket.socket(fileno=options.commands)).serve()


def warm_up(preload: str | None) -> None:
    """Import all that a launch needs, and call `preload()` of one more module, which need not exist."""
    for name in WARM_MODULES:
        importlib.import_module(name)
    _warm_codec()
    if preload is not None:
        _preload(preload)
    gc.collect()
    gc.freeze()  # or the collector would copy every page by touching it


def _warm_codec() -> None:
    """Have the JSON codec of launch orders compiled before the fork instead of in every worker."""
    plan = Plan(Mesh(), BatchSplit(1, 1, 1, (1,)))
    generation = Generation(0, plan, Assignment((AssignedNode("", 0, 1),)))
    order = LaunchOrder("", generation, Entrypoint(""), "", None, None, None, None)
    wire.loads(wire.dumps(order), LaunchOrder)
    wire.loads(wire.dumps(WorkerError(0, "", "", "", 0, 0.0)), WorkerError)


def _preload(name: str) -> None:
    try:
        module = importlib.import_module(name)
        getattr(module, "preload", lambda: None)()
    except ImportError:
        traceback.print_exc()  # scripts that do not need it run all the same; the others will say so themselves


class Zygote:
    """Serves one launch at a time."""

    def __init__(self, commands: socket.socket) -> None:
        self._commands = commands
        self._received = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(commands, selectors.EVENT_READ)
        self._live: tuple[int, int] | None = None
        """Pid and pidfd of the elastic process."""

    def serve(self) -> None:
        """Obey until the agent closes the socket."""
        self._send(event="warm")
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._commands:
                    self._end()
                elif not self._obey():
                    return

    def _send(self, **message: Any) -> None:
        self._commands.sendall(json.dumps(message).encode() + b"\n")

    def _obey(self) -> bool:
        data = self._commands.recv(65536)
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            self._launch(**json.loads(line)["launch"])
        return bool(data)

    def _launch(self, **launch: str) -> None:
        assert self._live is None, "a launch was ordered while another one is alive"
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_elastic(parent, launch)
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # here and in the child: whoever comes first
        pidfd = os.pidfd_open(pid)
        self._live = (pid, pidfd)
        self._selector.register(pidfd, selectors.EVENT_READ)
        self._send(event="launched", pid=pid)

    def _become_elastic(self, parent: int, launch: dict[str, str]) -> NoReturn:
        try:
            os.setpgid(0, 0)
            die_with_parent(parent)
            self._selector.close()
            self._commands.close()
            from agents.torchrun import elastic

            elastic.run(Path(launch["directory"]), Path(launch["socket"]), launch["node"], launch["address"])
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(70)

    def _end(self) -> None:
        """The elastic process has died: kill and reap whatever it left, then say so."""
        assert self._live is not None
        pid, pidfd = self._live
        self._selector.unregister(pidfd)
        os.close(pidfd)
        kill_group(pid)
        exit_codes: dict[int, int] = {}
        sweep(exit_codes.__setitem__, block=True)
        self._live = None
        self._send(event="gone", exit_code=exit_codes.pop(pid, -9), reaped=exit_codes)


if __name__ == "__main__":
    main(sys.argv[1:])
