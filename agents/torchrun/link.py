"""The elastic process's end of the agent's unix socket: newline-delimited JSON, blocking."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any


class AgentLink:
    """Tells the agent about one launch and hears the store's endpoint from it.

    A broken link raises OSError: the agent is gone then, and the parent-death signal is on its way.
    """

    def __init__(self, path: Path, generation: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self.send(type="elastic", generation=generation, pid=os.getpid())

    @property
    def fd(self) -> int:
        """File descriptor, for a forked worker to close."""
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Send one message."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Wait for the next message; raises ConnectionError when the agent closed the link."""
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the agent closed its socket")
        message: dict[str, Any] = json.loads(line)
        return message
