"""Listening: one uvicorn server beside the controller's own task, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from orchestrator.core.errors import Conflict
from orchestrator.server.app import create_app
from orchestrator.server.host import Host

MAX_MESSAGE_BYTES = 16 << 20
"""Longest WebSocket message that is read: a report with the traceback of every worker."""
GRACE_S = 2.0
"""How long open requests may take to end when the server stops."""


class _Server(uvicorn.Server):
    """Leaves the process's signal handlers alone: they are `serve`'s."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket (port 0 = a free one); raises `Conflict` when the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise Conflict(f"cannot listen on {host}:{port} ({error.strerror}): choose another --port or --host") from error


async def serve(host: Host, token: str, listener: socket.socket, ready: Callable[[int], None]) -> None:
    """Run the controller and its server until SIGINT, SIGTERM or cancellation; `ready` is told the real port."""
    closing = asyncio.Event()
    config = uvicorn.Config(
        create_app(host, token, closing),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=int(GRACE_S),
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    tasks: list[asyncio.Task[object]] = [serving, asyncio.create_task(host.run()), asyncio.create_task(closing.wait())]
    try:
        with _ending_on_signal(closing):
            ready(listener.getsockname()[1])
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        closing.set()
        server.should_exit = True
        try:
            await asyncio.wait([serving], timeout=2 * GRACE_S)
        finally:
            for task in tasks:
                task.cancel()
            listener.close()
            await asyncio.gather(*tasks, return_exceptions=True)
    for task in ended:
        task.result()


@contextlib.contextmanager
def _ending_on_signal(closing: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, closing.set)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
