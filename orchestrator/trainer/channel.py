"""The worker's end of the unix socket to its agent: newline-delimited JSON, served by one thread.

Training only ever appends to a queue. The thread greets, sends, pings every second and listens for save requests; a
lost connection is tried again quietly, and what was queued is sent again on the new one. When the queue is full the
oldest progress goes first: the next one says more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.types import SaveReport

PING_S = 1.0
RECONNECT_S = 0.2
QUEUE_LIMIT = 1000
"""Messages kept while the agent does not read."""


@dataclass(frozen=True, slots=True)
class Request:
    """The newest request of the agent; `number` 0 = none yet."""

    number: int = 0
    pause: bool = False


class Channel:
    """Talks to the agent until `close`; without a `path` every message is dropped."""

    def __init__(self, path: Path | None, *, generation: int, rank: int) -> None:
        self._path = path
        self._hello = _line(type="hello", generation=generation, rank=rank, pid=os.getpid())
        self._queue: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._request = Request()
        self._closed = path is None
        if path is not None:
            self._wake_read, self._wake_write = socket.socketpair()
            self._wake_write.setblocking(False)
            self._thread = threading.Thread(target=self._serve, name="regrow-channel", daemon=True)
            self._thread.start()

    @property
    def request(self) -> Request:
        """The newest save request of the agent."""
        return self._request

    def ready(self, step: int) -> None:
        """State restored: `step` steps are completed, training is about to go on."""
        self._send(type="ready", step=step)

    def progress(self, step: int, loss: float | None, loss_step: int | None) -> None:
        """`step` steps are completed; `loss` is the global mean loss of step `loss_step`, where known."""
        self._send(type="progress", step=step, loss=loss, loss_step=loss_step)

    def saved(self, report: SaveReport) -> None:
        """The rank's part of a save is durably written."""
        self._send(type="save", report=dataclasses.asdict(report))

    def paused(self, step: int) -> None:
        """Saved after `step` and about to exit because the agent asked to pause."""
        self._send(type="paused", step=step)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued is sent; False when that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or not self._queue, timeout_s)

    def close(self) -> None:
        """Drop what is queued and end the thread."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        self._thread.join(timeout=2.0)
        self._wake_read.close()
        self._wake_write.close()

    # ------------------------------------------------------------ the thread

    def _send(self, **message: Any) -> None:
        if self._closed:
            return
        with self._changed:
            if len(self._queue) >= QUEUE_LIMIT:
                self._forget_one()
            self._queue.append(_line(**message))
        self._wake()

    def _forget_one(self) -> None:
        progress = next((line for line in self._queue if b'"type":"progress"' in line), self._queue[0])
        self._queue.remove(progress)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread is about to wake up anyway
            self._wake_write.send(b"x")

    def _serve(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError):
                self._talk()
            if not self._closed:
                time.sleep(RECONNECT_S)

    def _talk(self) -> None:
        """Serve one connection until it breaks (OSError) or the channel is closed."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, selectors.DefaultSelector() as selector:
            connection.settimeout(5.0)
            connection.connect(str(self._path))
            connection.sendall(self._hello)
            selector.register(connection, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            received, next_ping = b"", time.monotonic() + PING_S
            while not self._closed:
                self._drain(connection)
                ready = {key.fileobj for key, _ in selector.select(max(0.0, next_ping - time.monotonic()))}
                if self._wake_read in ready:
                    self._wake_read.recv(4096)
                if connection in ready:
                    received = self._receive(connection, received)
                if time.monotonic() >= next_ping:
                    connection.sendall(_line(type="ping"))
                    next_ping = time.monotonic() + PING_S

    def _drain(self, connection: socket.socket) -> None:
        while self._queue:
            with self._changed:
                line = self._queue[0]
            connection.sendall(line)
            with self._changed:
                if self._queue and self._queue[0] is line:
                    self._queue.popleft()
                self._changed.notify_all()

    def _receive(self, connection: socket.socket, received: bytes) -> bytes:
        data = connection.recv(65536)
        if not data:
            raise ConnectionResetError("the agent closed the socket")
        *lines, rest = (received + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError):  # not for us to understand
                self._obey(json.loads(line))
        return rest

    def _obey(self, message: dict[str, Any]) -> None:
        if message.get("type") == "save":
            number, pause = int(message["request"]), bool(message["pause"])
            self._request = Request(max(self._request.number, number), self._request.pause or pause)


def _line(**message: Any) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
