from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from websockets.asyncio.server import Server, ServerConnection, serve

from agents.uplink import Uplink, agents_url
from orchestrator import wire
from orchestrator.core.errors import Conflict, Refused
from orchestrator.core.types import Directive, NodeReport

DIRECTIVE = Directive(3, heartbeat_s=30.0)


class Fake:
    """The other end."""

    def __init__(self) -> None:
        self.reports: list[NodeReport] = []
        self.answer: str = wire.pack(directive=DIRECTIVE)
        self.close_code: int | None = None
        self.connections: list[ServerConnection] = []

    async def serve(self, connection: ServerConnection) -> None:
        self.connections.append(connection)
        async for message in connection:
            self.reports.append(wire.unpack(message, "report", NodeReport))
            if self.close_code is not None:
                await connection.close(self.close_code)
                return
            await connection.send(self.answer)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
async def server(fake: Fake) -> AsyncIterator[Server]:
    async with serve(fake.serve, "127.0.0.1", 0) as running:
        yield running


@pytest.fixture
def obeyed() -> list[Directive]:
    return []


@pytest.fixture
async def uplink(server: Server, obeyed: list[Directive]) -> Uplink:
    port = next(iter(server.sockets)).getsockname()[1]
    report = NodeReport("n", "i", "127.0.0.1", 1)
    return Uplink(f"http://127.0.0.1:{port}", "n", "t", lambda: report, obeyed.append)


@pytest.fixture
async def running(uplink: Uplink) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(uplink.run())
    yield task
    task.cancel()
    with suppress(asyncio.CancelledError, Refused, Conflict):
        await task


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # nothing sets an event for a test
            await asyncio.sleep(0.01)


async def test_answers_are_obeyed_and_set_the_heartbeat(
    fake: Fake, uplink: Uplink, running: asyncio.Task[None], obeyed: list[Directive]
) -> None:
    await until(lambda: obeyed)
    assert obeyed == [DIRECTIVE]
    await asyncio.sleep(0.3)
    assert len(fake.reports) == 1, "thirty seconds between heartbeats"
    uplink.changed(urgent=True)
    await until(lambda: len(fake.reports) == 2)
    for _ in range(50):
        uplink.changed(urgent=False)
        await asyncio.sleep(0.002)
    await until(lambda: len(fake.reports) >= 3)
    assert len(fake.reports) <= 4, "ordinary progress waits"


@pytest.mark.parametrize("answer", ["", "{}", '{"v": 99, "directive": {}}', '{"v": 1, "directive": null}', "\ud7ff"])
async def test_nonsense_is_ignored(
    fake: Fake, uplink: Uplink, running: asyncio.Task[None], obeyed: list[Directive], answer: str
) -> None:
    fake.answer = answer
    await until(lambda: fake.reports)
    fake.answer = wire.pack(directive=DIRECTIVE)
    uplink.changed(urgent=True)
    await until(lambda: obeyed)
    assert len(fake.connections) == 1


async def test_lost_connection_is_opened_again(fake: Fake, running: asyncio.Task[None]) -> None:
    await until(lambda: fake.reports)
    await fake.connections[0].close()
    await until(lambda: len(fake.connections) == 2 and len(fake.reports) >= 2)


async def test_name_taken_over_ends_the_agent(fake: Fake, running: asyncio.Task[None]) -> None:
    fake.close_code = 4409
    with pytest.raises(Conflict, match="'n'"):
        await asyncio.wait_for(asyncio.shield(running), 10)


async def test_farewell_is_the_last_report(fake: Fake, uplink: Uplink, running: asyncio.Task[None]) -> None:
    await until(lambda: fake.reports)
    before = len(fake.reports)
    await uplink.farewell()
    await asyncio.wait_for(running, 10)
    assert len(fake.reports) == before + 1
    assert len(fake.connections) == 1


def test_url() -> None:
    assert agents_url("http://h:1", "a b") == "ws://h:1/v1/agents?node=a%20b"
    assert agents_url("https://h:1/", "n") == "wss://h:1/v1/agents?node=n"
