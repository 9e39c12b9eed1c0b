"""The agent's one connection to the controller: reports up, directives down, for ever.

A report goes out every `heartbeat_s` and at once when something urgent changed; ordinary progress waits until
`PROGRESS_S` have passed since the last report. A lost connection is opened again; what runs is not touched meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import quote

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from orchestrator import wire
from orchestrator.core.errors import Conflict, InvalidInput, Refused
from orchestrator.core.types import Directive, NodeReport

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 1.0
PROGRESS_S = 0.2
"""Shortest time between reports of ordinary progress."""
OPEN_TIMEOUT_S = 5.0
PING_S = 5.0
PONG_S = 20.0
"""A controller that does not answer a ping for so long is connected to afresh."""
REPLACED = 4409
"""Close code of the controller: a newer connection has taken this node's name."""
MESSAGE_LIMIT = 16 << 20
FAREWELL_S = 1.0


def agents_url(controller: str, node: str) -> str:
    """`http://host:8080`, `node-0` -> `ws://host:8080/v1/agents?node=node-0`."""
    scheme, _, rest = controller.partition("://")
    return f"{'wss' if scheme == 'https' else 'ws'}://{rest.rstrip('/')}/v1/agents?node={quote(node, safe='')}"


class Uplink:
    """`report` makes the current report; `obey` takes each directive."""

    def __init__(
        self,
        controller: str,
        node: str,
        token: str,
        report: Callable[[], NodeReport],
        obey: Callable[[Directive], None],
    ) -> None:
        self._controller = controller
        self._node = node
        self._url = agents_url(controller, node)
        self._headers = {"Authorization": f"Bearer {token}"}
        self._report = report
        self._obey = obey
        self._heartbeat_s = 1.0
        self._due = asyncio.Event()
        self._sent_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._connection: ClientConnection | None = None
        self._closing = False

    def changed(self, urgent: bool) -> None:
        """The report has changed."""
        loop = asyncio.get_running_loop()
        if urgent:
            self._due.set()
        elif self._timer is None and not self._due.is_set():
            self._timer = loop.call_at(max(loop.time(), self._sent_s + PROGRESS_S), self._due.set)

    async def run(self) -> None:
        """Until `farewell`; raises Refused when the token is not accepted, Conflict when the name is taken over."""
        retry_s, said = FIRST_RETRY_S, ""
        while not self._closing:
            try:
                async with self._connect() as connection:
                    log.info("connected to the controller at %s", self._controller)
                    retry_s, said = FIRST_RETRY_S, ""
                    self._connection = connection
                    await self._talk(connection)
            except InvalidStatus as error:
                said = self._turned_away(error, said)
            except (OSError, WebSocketException, TimeoutError) as error:
                said = _say_once(said, f"the controller at {self._controller} cannot be reached ({error}); trying on")
            finally:
                self._connection = None
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def farewell(self) -> None:
        """Send the last report and close for good, as far as that works at once."""
        self._closing = True
        if self._connection is not None:
            with suppress(OSError, WebSocketException, TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await self._connection.send(wire.pack(report=self._report()))
                    await self._connection.close()

    def _connect(self) -> connect:
        return connect(
            self._url,
            additional_headers=self._headers,
            proxy=None,  # the controller is on the cluster's own network
            compression=None,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=FAREWELL_S,
            ping_interval=PING_S,
            ping_timeout=PONG_S,
            max_size=MESSAGE_LIMIT,
        )

    def _turned_away(self, error: InvalidStatus, said: str) -> str:
        status = error.response.status_code
        if status in {401, 403}:
            raise Refused(
                f"the controller at {self._controller} refused this agent (HTTP {status}): "
                "give it the controller's token in REGROW_TOKEN or with --token-file"
            ) from error
        return _say_once(said, f"the controller at {self._controller} answered HTTP {status}; trying on")

    async def _talk(self, connection: ClientConnection) -> None:
        sender = asyncio.get_running_loop().create_task(self._send(connection))
        try:
            async for message in connection:
                self._take(message)
        except ConnectionClosed:
            self._check_replaced(connection)
            raise
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    def _check_replaced(self, connection: ClientConnection) -> None:
        """Two agents of one name would take it from each other for ever: the older one gives way."""
        if connection.close_code == REPLACED:
            raise Conflict(
                f"another agent has taken over the name {self._node!r}: give every agent a --node name of its own"
            )

    def _take(self, message: str | bytes) -> None:
        try:
            directive = wire.unpack(message, "directive", Directive)
        except InvalidInput as error:
            log.warning("ignored a message of the controller: %s", error)
            return
        self._heartbeat_s = directive.heartbeat_s
        self._obey(directive)

    async def _send(self, connection: ClientConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._due.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            await connection.send(wire.pack(report=self._report()))
            self._sent_s = loop.time()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), self._heartbeat_s)


def _say_once(said: str, message: str) -> str:
    if message != said:
        log.warning("%s", message)
    return message
