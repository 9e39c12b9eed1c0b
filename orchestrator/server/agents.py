"""The agents' connections: reports in, directives out, one live connection per node."""

from __future__ import annotations

import asyncio
import logging
import re

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from orchestrator import wire
from orchestrator.core.errors import InvalidInput
from orchestrator.core.types import NodeReport
from orchestrator.server.host import Host

log = logging.getLogger(__name__)

REPLACED = 4409
"""Close code: a newer connection has taken the node's name."""
INVALID = 1008
"""Close code (policy violation): a message could not be understood."""

_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_REASON_BYTES = 123  # what a close frame can carry


class Agents:
    """All agents' connections of one controller."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._live: dict[str, Connection] = {}

    async def endpoint(self, websocket: WebSocket) -> None:
        """`/v1/agents?node=NAME`: take the connection over until it ends; the newest of a node wins."""
        node = websocket.query_params.get("node", "")
        await websocket.accept()
        if not _NODE.fullmatch(node):
            return await _close(websocket, INVALID, f"{node[:40]!r} is no node name: connect to /v1/agents?node=NAME")
        connection = Connection(self._host, websocket, node)
        previous, self._live[node] = self._live.get(node), connection
        if previous is not None:
            await previous.close(REPLACED, f"a newer connection of {node} replaces this one")
        try:
            await connection.serve()
        finally:
            if self._live.get(node) is connection:
                del self._live[node]
                if connection.instance is not None:
                    await self._host.disconnected(node, connection.instance)
        return None


class Connection:
    """One agent's connection."""

    def __init__(self, host: Host, websocket: WebSocket, node: str) -> None:
        self._host = host
        self._websocket = websocket
        self._node = node
        self._sending = asyncio.Lock()
        self.instance: str | None = None
        """Start of the agent, from its first report on."""

    async def serve(self) -> None:
        """Receive and send until either side closes."""
        async with asyncio.TaskGroup() as tasks:
            sender = tasks.create_task(self._push())
            try:
                await self._receive()
            except InvalidInput as error:
                log.warning("the connection of %s is closed: %s", self._node, error)
                await self.close(INVALID, str(error))
            finally:
                sender.cancel()

    async def close(self, code: int, reason: str) -> None:
        """Close with a reason; harmless when it is closed already."""
        await _close(self._websocket, code, reason)

    async def _receive(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:
                raise InvalidInput("a report is a text frame, not a binary one")
            report = wire.unpack(text, "report", NodeReport)
            if report.node != self._node:
                raise InvalidInput(f"a report of {report.node!r} came over the connection of {self._node!r}")
            _check(report)
            self.instance = report.instance
            await self._host.report(report)
            await self._answer()

    async def _push(self) -> None:
        async for _ in self._host.directives(self._node):
            await self._answer()

    async def _answer(self) -> None:
        """Send the directive as it is now: read under the lock, so that none overtakes a newer one."""
        async with self._sending:
            directive = self._host.directive(self._node)
            if directive is None or self._websocket.application_state is not WebSocketState.CONNECTED:
                return
            try:
                await self._websocket.send_text(wire.pack(directive=directive))
            except (WebSocketDisconnect, RuntimeError):
                log.debug("%s went away before its directive was sent", self._node)


def _check(report: NodeReport) -> None:
    """Raises `InvalidInput` for numbers that no node has: the planner divides by them."""
    if not 0 < report.speed <= 1:
        raise InvalidInput(f"a node's speed is above 0 and up to 1, not {report.speed}")
    if report.devices < 0 or report.device_memory_bytes < 0:
        raise InvalidInput(f"a node has no {report.devices} devices of {report.device_memory_bytes} bytes")


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    if websocket.application_state is not WebSocketState.CONNECTED:
        return
    try:
        await websocket.close(code, reason.encode()[:_REASON_BYTES].decode(errors="ignore"))
    except (WebSocketDisconnect, RuntimeError):
        log.debug("the connection was closed already")
