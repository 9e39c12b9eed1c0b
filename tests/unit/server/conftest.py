from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import httpx2
import pytest

from orchestrator.server.serving import listen, serve

from .host import RememberingHost

TOKEN = "correct-horse"


@dataclass
class Served:
    """A real server on a free port."""

    host: RememberingHost
    port: int
    task: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, token: str | None = TOKEN) -> httpx2.AsyncClient:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=20)


async def until(condition: Callable[[], object], deadline_s: float = 20.0) -> None:
    """Wait until the condition holds; fails after the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    host = RememberingHost()
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(host, TOKEN, listen("127.0.0.1", 0), ready.set_result))
    yield Served(host, await ready, task)
    if not task.cancelling():
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
