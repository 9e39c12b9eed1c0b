"""Starting and ending the server."""

from __future__ import annotations

import asyncio
import os
import signal
import socket

import httpx2
import pytest

from orchestrator.core.errors import Conflict, RegrowError
from orchestrator.server.auth import TokenRequired
from orchestrator.server.serving import listen, serve

from .conftest import TOKEN, Served
from .host import RememberingHost


async def test_the_controller_runs_beside_the_server(served: Served) -> None:
    async with served.client() as client:
        await client.get("/healthz")
    assert served.host.running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_order(number: signal.Signals) -> None:
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(RememberingHost(), TOKEN, listen("127.0.0.1", 0), ready.set_result))
    port = await ready
    os.kill(os.getpid(), number)
    async with asyncio.timeout(20):
        await task
    with pytest.raises(httpx2.ConnectError):
        async with httpx2.AsyncClient() as client:
            await client.get(f"http://127.0.0.1:{port}/healthz")


class FailingHost(RememberingHost):
    async def run(self) -> None:
        raise RegrowError("the journal could not be written: disk full")


async def test_a_failing_controller_takes_the_server_with_it() -> None:
    with pytest.raises(RegrowError, match="disk full"):
        await serve(FailingHost(), TOKEN, listen("127.0.0.1", 0), lambda _: None)


def test_a_taken_port_is_a_conflict() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"127.0.0.1:{port}"):
            listen("127.0.0.1", port)


def test_an_empty_token_is_no_token() -> None:
    with pytest.raises(ValueError, match="empty token"):
        TokenRequired(None, "")  # type: ignore[arg-type]
