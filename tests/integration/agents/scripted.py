"""A controller that does what a test tells it: real WebSocket, real wire format, no decisions of its own."""

from __future__ import annotations

import http
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, urlparse

from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from orchestrator import wire
from orchestrator.core.types import (
    ENDED,
    AssignedNode,
    Assignment,
    BatchSplit,
    Directive,
    Entrypoint,
    Generation,
    LaunchOrder,
    LaunchReport,
    Mesh,
    NodeReport,
    Plan,
    WorkerState,
)

TOKEN = "secret"
DEADLINE_S = 60.0

T = TypeVar("T")


class ScriptedController:
    """Answers every report with the directive set for the node; keeps all reports."""

    def __init__(self, port: int = 0) -> None:
        self.reports: dict[str, list[NodeReport]] = defaultdict(list)
        self.changed = threading.Condition()
        self._directives: dict[str, Directive] = {}
        self._connections: dict[str, ServerConnection] = {}
        self._server = serve(self._serve, "127.0.0.1", port, process_request=self._authorize, compression=None)
        self.port = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Die like a process: every connection is cut."""
        self._server.shutdown()
        with self.changed:
            connections = list(self._connections.values())
        for connection in connections:
            connection.socket.close()
        self._thread.join()

    def _authorize(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return connection.respond(http.HTTPStatus.FORBIDDEN, "wrong token\n")
        return None

    def _serve(self, connection: ServerConnection) -> None:
        node = parse_qs(urlparse(connection.request.path).query)["node"][0]
        with self.changed:
            replaced = self._connections.get(node)
            self._connections[node] = connection
        if replaced is not None:
            replaced.close(4409, "replaced")
        try:
            for message in connection:
                report = wire.unpack(message, "report", NodeReport)
                with self.changed:
                    self.reports[node].append(report)
                    self.changed.notify_all()
                    directive = self._directives.get(node)
                if directive is not None:
                    with suppress(ConnectionClosed):  # there may be more to read
                        connection.send(wire.pack(directive=directive))
        except (ConnectionClosed, OSError):
            pass

    def direct(self, node: str, directive: Directive) -> None:
        """What the node is told from now on."""
        with self.changed:
            self._directives[node] = directive
            connection = self._connections.get(node)
        if connection is not None:
            with suppress(ConnectionClosed):
                connection.send(wire.pack(directive=directive))

    def connected(self, node: str) -> bool:
        return node in self._connections

    def report(self, node: str) -> NodeReport | None:
        return self.reports[node][-1] if self.reports[node] else None

    def launch(self, node: str, generation: int) -> LaunchReport | None:
        """The newest report of the launch, if the node's newest report is about this generation."""
        report = self.report(node)
        found = report.launch if report else None
        return found if found is not None and found.generation == generation else None

    def wait(self, what: str, find: Callable[[], T | None], deadline_s: float = DEADLINE_S) -> T:
        """Wait until `find` returns something true."""
        end = time.monotonic() + deadline_s
        with self.changed:
            while True:
                found = find()
                if found:
                    return found
                left = end - time.monotonic()
                if left <= 0:
                    raise AssertionError(
                        f"no {what} within {deadline_s} s; last: { {n: r[-1] for n, r in self.reports.items()} }"
                    )
                self.changed.wait(min(left, 0.5))

    def order(self, order: LaunchOrder) -> None:
        """Have all nodes of the order run it, and tell the store's endpoint once it is known."""
        directive = Directive(order.generation.number, order, heartbeat_s=0.5)
        names = order.generation.assignment.names
        for node in names:
            self.direct(node, directive)
        if len(names) > 1:
            store = self.wait(
                "store", lambda: (found := self.launch(names[0], order.generation.number)) and found.store
            )
            for node in names:
                self.direct(node, replace(directive, launch=replace(order, store=store)))

    def ended(self, node: str, generation: int, deadline_s: float = DEADLINE_S) -> LaunchReport:
        """Wait for the end of the launch."""

        def find() -> LaunchReport | None:
            found = self.launch(node, generation)
            return found if found is not None and found.state in ENDED else None

        return self.wait(f"end of generation {generation} on {node}", find, deadline_s)

    def training(self, node: str, generation: int, workers: int) -> list[int]:
        """Wait until all workers of the launch train; their pids in rank order."""

        def find() -> list[int] | None:
            launch = self.launch(node, generation)
            if launch is None or len(launch.workers) != workers:
                return None
            ready = all(worker.state is WorkerState.RUNNING for worker in launch.workers)
            return [worker.pid for worker in launch.workers] if ready else None

        return self.wait("training workers", find)


def make_order(
    generation: int, nodes: dict[str, int], script: Path, *args: str, environment: dict[str, str] | None = None
) -> LaunchOrder:
    """An order for `nodes` (name -> devices), all data-parallel."""
    parts, first = [], 0
    for node, devices in nodes.items():
        parts.append(AssignedNode(node, first, devices))
        first += devices
    plan = Plan(Mesh(dp_shard=first), BatchSplit(first, 1, 1, (1,) * first))
    return LaunchOrder(
        job="test",
        generation=Generation(generation, plan, Assignment(tuple(parts))),
        entrypoint=Entrypoint(str(script), args, str(script.parent)),
        checkpoint_uri="",
        checkpoint_path=None,
        save_every_s=None,
        save_every_steps=None,
        store=None,
        environment=tuple((environment or {}).items()),
    )


def wait_until(condition: Callable[[], bool], deadline_s: float) -> None:
    """Poll for what sends no event."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {deadline_s} s"
        time.sleep(0.01)
