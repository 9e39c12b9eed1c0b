"""A controller that only remembers what it was told, for tests of the server alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from prometheus_client import CollectorRegistry, Gauge

from orchestrator.core.errors import Conflict, InvalidInput
from orchestrator.core.spec import JobSpec
from orchestrator.core.status import Health, JobStatus, NodeStatus, Phase, Verdict
from orchestrator.core.types import Directive, NodeReport, Probes

NODE = NodeStatus("node-1", Verdict(Health.HEALTHY, "reports"), 1, 1, (0,), (42,), 3, False, Probes())
STATUS = JobStatus("gpt", Phase.RUNNING, "training", 1, None, None, (NODE,), 3, 2.5, 0, (), None, 100.0)


class RememberingHost:
    """Implements `orchestrator.server.host.Host`."""

    def __init__(self) -> None:
        self.metrics_registry = CollectorRegistry()
        Gauge("regrow_step", "Steps.", registry=self.metrics_registry).set(3)
        self.calls: list[tuple[object, ...]] = []
        self.reports: list[NodeReport] = []
        self.current: JobStatus | None = STATUS
        self.broken = False
        self._directives: dict[str, Directive] = {}
        self._changed = asyncio.Event()
        self.running = False

    async def report(self, report: NodeReport) -> None:
        self.reports.append(report)
        self.notify()

    async def disconnected(self, node: str, instance: str) -> None:
        self.calls.append(("disconnected", node, instance))
        self.notify()

    def directive(self, node: str) -> Directive | None:
        return self._directives.get(node)

    async def directives(self, node: str) -> AsyncIterator[Directive]:
        sent: Directive | None = None
        while True:
            current = self.directive(node)
            if current is not None and current != sent:
                sent = current
                yield current
            else:
                await self.changed()

    def direct(self, node: str, directive: Directive) -> None:
        self._directives[node] = directive
        self.notify()

    def become(self, **changes: object) -> None:
        assert self.current is not None
        self.current = replace(self.current, **changes)  # type: ignore[arg-type]
        self.notify()

    def status(self, name: str) -> JobStatus:
        if self.broken:
            raise ZeroDivisionError("a secret")
        if self.current is None or name != self.current.name:
            raise InvalidInput(f"no job is called {name}")
        return self.current

    def jobs(self) -> list[JobStatus]:
        return [] if self.current is None else [self.current]

    async def submit(self, spec: JobSpec) -> None:
        if self.current is not None:
            raise Conflict(f"job {self.current.name} is active")
        self.calls.append(("submit", spec.name))

    async def stop(self, name: str) -> None:
        self.calls.append(("stop", name))

    async def save(self, name: str) -> None:
        self.calls.append(("save", name))

    async def drain(self, name: str, node: str) -> None:
        self.calls.append(("drain", name, node))

    async def undrain(self, name: str, node: str) -> None:
        self.calls.append(("undrain", name, node))

    async def changed(self) -> None:
        await self._changed.wait()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        self.running = True
        await asyncio.Event().wait()
