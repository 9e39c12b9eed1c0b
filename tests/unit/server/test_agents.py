"""The agents' WebSocket, over real sockets."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from orchestrator import wire
from orchestrator.core.types import Directive, NodeReport
from orchestrator.server.agents import INVALID, REPLACED

from .conftest import TOKEN, Served, until


def dial(served: Served, node: str = "node-1") -> connect:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return connect(f"ws://127.0.0.1:{served.port}/v1/agents?node={node}", additional_headers=headers, proxy=None)


def report(node: str = "node-1", instance: str = "a") -> NodeReport:
    return NodeReport(node, instance, "127.0.0.1", 1)


async def heard(connection: ClientConnection) -> Directive:
    async with asyncio.timeout(20):
        return wire.unpack(await connection.recv(), "directive", Directive)


async def closed(connection: ClientConnection) -> tuple[int, str]:
    with pytest.raises(ConnectionClosed) as caught:
        async with asyncio.timeout(20):
            while True:
                await connection.recv()
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code, caught.value.rcvd.reason


async def test_each_report_is_answered(served: Served) -> None:
    async with dial(served) as connection:
        served.host.direct("node-1", Directive(generation=3))
        assert (await heard(connection)).generation == 3  # unasked
        for _ in range(2):
            await connection.send(wire.pack(report=report()))
            assert (await heard(connection)).generation == 3
    assert served.host.reports == [report(), report()]


async def test_a_changed_directive_is_sent_unasked_and_only_to_its_node(served: Served) -> None:
    async with dial(served) as connection, dial(served, "node-2") as other:
        served.host.direct("node-1", Directive(generation=1))
        served.host.direct("node-1", Directive(generation=2))
        while (await heard(connection)).generation != 2:
            pass
        served.host.direct("node-2", Directive(generation=9))
        assert (await heard(other)).generation == 9


async def test_no_job_no_answer(served: Served) -> None:
    async with dial(served) as connection:
        await connection.send(wire.pack(report=report()))
        await until(lambda: served.host.reports)
        served.host.direct("node-1", Directive(generation=1))
        assert (await heard(connection)).generation == 1


async def test_the_controller_hears_of_the_end(served: Served) -> None:
    async with dial(served) as connection:
        await connection.send(wire.pack(report=report(instance="b")))
        await until(lambda: served.host.reports)
    await until(lambda: served.host.calls)
    assert served.host.calls == [("disconnected", "node-1", "b")]


async def test_an_aborted_connection_is_noticed_at_once(served: Served) -> None:
    connection = await dial(served)
    await connection.send(wire.pack(report=report()))
    await until(lambda: served.host.reports)
    connection.transport.abort()
    await until(lambda: served.host.calls)
    assert served.host.calls == [("disconnected", "node-1", "a")]


async def test_a_newer_connection_replaces_the_old(served: Served) -> None:
    async with dial(served) as old:
        await old.send(wire.pack(report=report(instance="old")))
        await until(lambda: served.host.reports)
        async with dial(served) as new:
            code, reason = await closed(old)
            assert (code, "node-1" in reason) == (REPLACED, True)
            await new.send(wire.pack(report=report(instance="new")))
            await until(lambda: len(served.host.reports) == 2)
            served.host.direct("node-1", Directive(generation=4))
            assert (await heard(new)).generation == 4
            assert served.host.calls == []  # the node is still here
    await until(lambda: served.host.calls)
    assert served.host.calls == [("disconnected", "node-1", "new")]


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ("{", "not JSON"),
        ("[]", "version"),
        ('{"v":2,"report":{}}', "version 2"),
        ('{"v":1}', "report"),
        ('{"v":1,"report":{"node":"node-1"}}', "does not fit"),
        (wire.pack(report=report("node-2")), "'node-2'"),
        *(
            (wire.pack(report=replace(report(), speed=speed)), f"up to 1, not {speed}")
            for speed in (0.0, -0.5, 1.5, float("nan"))
        ),
        (wire.pack(report=replace(report(), devices=-1)), "-1 devices"),
        (wire.pack(report=replace(report(), device_memory_bytes=-8)), "of -8 bytes"),
        (b"\x00", "text frame"),
    ],
)
async def test_nonsense_closes_the_connection_with_a_reason(served: Served, frame: str | bytes, words: str) -> None:
    async with dial(served) as connection:
        await connection.send(frame)
        code, reason = await closed(connection)
    assert code == INVALID
    assert words in reason
    assert served.host.reports == []


@pytest.mark.parametrize("node", ["", "-x", "a/b", "a" * 300])
async def test_a_connection_needs_a_node_name(served: Served, node: str) -> None:
    async with dial(served, node) as connection:
        code, reason = await closed(connection)
    assert code == INVALID
    assert "no node name" in reason


async def test_stopping_the_server_closes_connections_soon(served: Served) -> None:
    async with dial(served) as connection:
        await connection.send(wire.pack(report=report()))
        await until(lambda: served.host.reports)
        served.task.cancel()
        code, _ = await closed(connection)
        assert code == 1012
