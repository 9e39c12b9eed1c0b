"""What the server needs of a controller: the calls behind the routes, and nothing else of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from prometheus_client import CollectorRegistry

from orchestrator.core.spec import JobSpec
from orchestrator.core.status import JobStatus
from orchestrator.core.types import Directive, NodeReport


class Host(Protocol):
    """The controller as the server sees it."""

    @property
    def metrics_registry(self) -> CollectorRegistry:
        """What `/metrics` shows."""

    async def report(self, report: NodeReport) -> None:
        """One heartbeat."""

    async def disconnected(self, node: str, instance: str) -> None:
        """The connection of that start of the node's agent was closed."""

    def directive(self, node: str) -> Directive | None:
        """What should be on the node now; None = no job."""

    def directives(self, node: str) -> AsyncIterator[Directive]:
        """The directive at once, if there is one, and then after each change."""

    def status(self, name: str) -> JobStatus:
        """The job's state; raises `InvalidInput` when there is no such job."""

    def jobs(self) -> list[JobStatus]:
        """The states of all jobs."""

    async def submit(self, spec: JobSpec) -> None:
        """Start a job; raises `Conflict` when one is active."""

    async def stop(self, name: str) -> None:
        """Save and end a job."""

    async def save(self, name: str) -> None:
        """Save at the next step on which the ranks agree."""

    async def drain(self, name: str, node: str) -> None:
        """Leave a node out from the next generation on; raises `InvalidInput` when there is no such node."""

    async def undrain(self, name: str, node: str) -> None:
        """Use a drained node again."""

    async def changed(self) -> None:
        """Return after the next change of any status."""

    async def run(self) -> None:
        """Work until cancelled."""
