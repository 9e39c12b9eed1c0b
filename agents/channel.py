"""The agent's unix socket: newline-delimited JSON from workers and elastic processes, and to them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.core.errors import InvalidInput

log = logging.getLogger(__name__)

MESSAGE_LIMIT = 1 << 20
"""Longest line in bytes; a connection that sends more is closed."""
_LONGEST_SOCKET_PATH = 100
"""The kernel takes 107 bytes."""

ELASTIC = -1
"""In the place of a rank: the elastic process."""

Receive = Callable[[int, int, dict[str, Any]], None]
"""Called with generation, rank (or `ELASTIC`) and message.

It raises KeyError, TypeError, ValueError or InvalidInput at what makes no sense, and the connection is closed.
"""


class Channel:
    """Serves the socket; connections are known by generation and rank."""

    def __init__(self, directory: Path, receive: Receive) -> None:
        self.path = _socket_path(directory)
        self._receive = receive
        self._writers: dict[tuple[int, int], asyncio.StreamWriter] = {}
        self._open = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def serve(self) -> None:
        """Listen until cancelled."""
        self.path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._connected, self.path, limit=MESSAGE_LIMIT)
        try:
            async with server:
                await server.serve_forever()
        finally:
            self.path.unlink(missing_ok=True)

    def send(self, generation: int, rank: int, **message: Any) -> bool:
        """Send to a connected process; False when it is not connected."""
        writer = self._writers.get((generation, rank))
        if writer is None or writer.is_closing():
            return False
        writer.write(json.dumps(message).encode() + b"\n")
        return True

    async def drained(self, timeout_s: float) -> None:
        """Wait until every connection is closed and all that came over it has been taken in."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._quiet.wait(), timeout_s)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        self._quiet.clear()
        key: tuple[int, int] | None = None
        try:
            key = await self._greeted(reader)
            self._writers[key] = writer
            self._receive(*key, {"type": "hello"})
            while line := await reader.readline():
                self._receive(*key, json.loads(line))
        except (KeyError, TypeError, ValueError, InvalidInput) as error:
            log.warning("closed a connection to the worker socket whose message makes no sense: %r", error)
        except ConnectionError:
            pass  # the process was killed with messages unread
        finally:
            if key is not None and self._writers.get(key) is writer:
                del self._writers[key]
            writer.close()
            self._open -= 1
            if self._open == 0:
                self._quiet.set()

    async def _greeted(self, reader: asyncio.StreamReader) -> tuple[int, int]:
        hello = json.loads(await reader.readline() or "null")
        if hello["type"] not in {"hello", "elastic"}:
            raise ValueError(f"the first line must be a hello, not {hello['type']!r}")
        return int(hello["generation"]), int(hello["rank"]) if hello["type"] == "hello" else ELASTIC


def _socket_path(directory: Path) -> Path:
    path = directory.resolve() / "agent.sock"
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
        return path
    return Path(tempfile.mkdtemp(prefix="regrow-")) / "agent.sock"
