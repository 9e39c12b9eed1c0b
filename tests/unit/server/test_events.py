"""The event stream, over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx2
import pytest

from orchestrator import wire
from orchestrator.core.status import JobStatus, Phase
from orchestrator.server import events

from .conftest import Served


async def statuses(response: httpx2.Response) -> AsyncIterator[JobStatus]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield wire.loads(line.removeprefix("data: "), JobStatus)


async def test_the_status_now_and_after_each_change(served: Served) -> None:
    async with served.client() as client, client.stream("GET", "/v1/jobs/gpt/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        stream = statuses(response)
        assert (await anext(stream)).step == 3
        served.host.become(step=4)
        assert (await anext(stream)).step == 4
        served.host.become(phase=Phase.SUCCEEDED)
        assert (await anext(stream)).phase is Phase.SUCCEEDED


async def test_only_time_is_no_change(served: Served) -> None:
    async with served.client() as client, client.stream("GET", "/v1/jobs/gpt/events") as response:
        stream = statuses(response)
        await anext(stream)
        served.host.become(time_s=200.0)
        await asyncio.sleep(0.05)
        served.host.become(time_s=300.0, step=5)
        assert (await anext(stream)).step == 5


async def test_changes_in_quick_succession_are_merged(served: Served) -> None:
    async with served.client() as client, client.stream("GET", "/v1/jobs/gpt/events?interval_s=0.3") as response:
        stream = statuses(response)
        await anext(stream)
        served.host.become(step=10)
        assert (await anext(stream)).step == 10
        begin_s = time.monotonic()
        for step in range(11, 21):
            served.host.become(step=step)
            await asyncio.sleep(0.001)
        assert (await anext(stream)).step == 20
        assert time.monotonic() - begin_s > 0.2


async def test_a_silent_stream_is_kept_alive(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_S", 0.05)
    async with served.client() as client, client.stream("GET", "/v1/jobs/gpt/events") as response:
        lines = response.aiter_lines()
        async with asyncio.timeout(20):
            while await anext(lines) != ": nothing has changed":
                pass


async def test_streams_end_when_the_server_stops(served: Served) -> None:
    async with served.client() as client, client.stream("GET", "/v1/jobs/gpt/events") as response:
        stream = statuses(response)
        await anext(stream)
        begin_s = time.monotonic()
        served.task.cancel()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert time.monotonic() - begin_s < 2
