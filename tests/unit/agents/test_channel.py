from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agents.channel import ELASTIC, Channel

Heard = list[tuple[int, int, dict[str, Any]]]


@pytest.fixture
async def heard() -> Heard:
    return []


@pytest.fixture
async def channel(tmp_path: Path, heard: Heard) -> AsyncIterator[Channel]:
    def receive(generation: int, rank: int, message: dict[str, Any]) -> None:
        if generation != 1:
            raise ValueError("another generation")
        heard.append((generation, rank, message))

    served = Channel(tmp_path, receive)
    task = asyncio.create_task(served.serve())
    await until(served.path.exists)
    yield served
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert not served.path.exists()


async def connect(
    channel: Channel, *lines: dict[str, Any] | bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(channel.path)
    for line in lines:
        writer.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
    await writer.drain()
    return reader, writer


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # nothing sets an event for a test
            await asyncio.sleep(0.01)


HELLO = {"type": "hello", "generation": 1, "rank": 4, "pid": 5}


async def test_messages_both_ways(channel: Channel, heard: Heard) -> None:
    reader, writer = await connect(channel, HELLO, {"type": "ping"})
    await until(lambda: len(heard) == 2)
    async with asyncio.timeout(10):
        assert heard == [(1, 4, {"type": "hello"}), (1, 4, {"type": "ping"})]
        assert channel.send(1, 4, type="save", request=1, pause=False)
        assert json.loads(await reader.readline()) == {"type": "save", "request": 1, "pause": False}
        assert not channel.send(1, 5, type="save")
        writer.close()
        await channel.drained(10)
        assert not channel.send(1, 4, type="save")


async def test_elastic_process_greets_in_its_own_way(channel: Channel, heard: Heard) -> None:
    _, writer = await connect(channel, {"type": "elastic", "generation": 1, "pid": 7})
    await until(lambda: heard)
    assert heard[0][1] == ELASTIC
    writer.close()


@pytest.mark.parametrize(
    "lines",
    [
        (b"\n",),
        (b"not json\n",),
        (b"[1]\n",),
        (b"\xff\xfe\n",),
        ({"type": "ping"},),
        ({**HELLO, "rank": "x"},),
        ({**HELLO, "generation": 2},),
        (HELLO, b"{\n"),
        (b"x" * (2 << 20),),
    ],
)
async def test_nonsense_is_hung_up_on(channel: Channel, lines: tuple[dict[str, Any] | bytes, ...]) -> None:
    with suppress(ConnectionError):
        reader, writer = await connect(channel, *lines)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()
    await channel.drained(10)
    reader, writer = await connect(channel, HELLO)
    writer.close()


async def test_drained_gives_up_in_time(channel: Channel, heard: Heard) -> None:
    _, writer = await connect(channel, HELLO)
    await until(lambda: heard)
    async with asyncio.timeout(10):
        await channel.drained(0.05)
    writer.close()


def test_long_folder_still_gets_a_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    path = Channel(deep, lambda *_: None).path
    assert len(str(path)) < 108
    path.parent.rmdir()
