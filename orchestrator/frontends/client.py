"""The client side of the HTTP API, for the commands and the local run."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx2

from orchestrator import wire
from orchestrator.core.errors import Conflict, InvalidInput, Refused, RegrowError, Unreachable
from orchestrator.core.status import JobStatus

_ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")
_TIMEOUT = httpx2.Timeout(10.0, read=30.0)


class Client:
    """One controller, as a person or a program talks to it. Every method raises the error that the answer stands for:
    `Refused` (token), `InvalidInput` (400, 404), `Conflict` (409), `Unreachable`.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        if not _ADDRESS.fullmatch(self.url):
            raise InvalidInput(f"{url!r} is no address of a controller: give one like http://127.0.0.1:7470")
        headers = {"Authorization": f"Bearer {token}"}
        self._http = httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=_TIMEOUT, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def healthy(self) -> bool:
        """Whether the controller answers."""
        try:
            return (await self._http.get("/healthz")).status_code == 200
        except httpx2.TransportError:
            return False

    async def jobs(self) -> list[JobStatus]:
        """Status of every job."""
        data = await self._call("GET", "/v1/jobs")
        return [wire.from_data(one, JobStatus) for one in data["jobs"]]

    async def status(self, name: str) -> JobStatus:
        """Status of one job."""
        status: JobStatus = wire.from_data(await self._call("GET", _job(name)), JobStatus)
        return status

    async def one_job(self, name: str | None) -> JobStatus:
        """Status of job `name`, or of the only job when it is None."""
        if name is not None:
            return await self.status(name)
        jobs = await self.jobs()
        if len(jobs) != 1:
            found = "has no job yet" if not jobs else f"has jobs {', '.join(job.name for job in jobs)}"
            raise InvalidInput(f"the controller at {self.url} {found}: " + ("submit one" if not jobs else "name one"))
        return jobs[0]

    async def submit(self, text: str) -> str:
        """Start the job that a job file describes; returns its name."""
        data = await self._call("POST", "/v1/jobs", text)
        return str(data["name"])

    async def stop(self, name: str) -> None:
        """Save and end a job."""
        await self._call("POST", f"{_job(name)}/stop")

    async def save(self, name: str) -> None:
        """Save now and train on."""
        await self._call("POST", f"{_job(name)}/save")

    async def drain(self, name: str, node: str) -> None:
        """Leave a node out."""
        await self._call("POST", f"{_job(name)}/nodes/{quote(node, safe='')}/drain")

    async def undrain(self, name: str, node: str) -> None:
        """Use a drained node again."""
        await self._call("POST", f"{_job(name)}/nodes/{quote(node, safe='')}/undrain")

    async def events(self, name: str, interval_s: float = 0.2) -> AsyncGenerator[JobStatus]:
        """The status of a job now and after every change; ends when the controller closes the stream."""
        path = f"{_job(name)}/events"
        try:
            async with self._http.stream("GET", path, params={"interval_s": interval_s}) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise self._error(response)
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        yield wire.loads(line.removeprefix("data: "), JobStatus)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    async def follow(self, name: str, interval_s: float = 0.2) -> AsyncGenerator[JobStatus]:
        """`events` until the job has ended, connecting again whenever the controller goes away."""
        while True:
            try:
                async with aclosing(self.events(name, interval_s)) as events:
                    async for status in events:
                        yield status
                        if status.phase.ended:
                            return
            except Unreachable:
                pass
            await asyncio.sleep(0.1)

    async def _call(self, method: str, path: str, body: str | None = None) -> Any:
        try:
            response = await self._http.request(method, path, content=body)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400:
            raise self._error(response)
        try:
            return response.json()
        except ValueError as error:
            raise Unreachable(f"what answers at {self.url} is not a regrow controller: check --url") from error

    def _unreachable(self, error: Exception) -> Unreachable:
        detail = str(error) or type(error).__name__
        return Unreachable(f"no controller answers at {self.url} ({detail}): start `regrow serve` or check --url")

    def _error(self, response: httpx2.Response) -> RegrowError:
        try:
            sentence = str(response.json()["error"])
        except (ValueError, KeyError, TypeError):
            sentence = f"{self.url} answered with status {response.status_code}: is it a regrow controller?"
        kinds: dict[int, type[RegrowError]] = {400: InvalidInput, 401: Refused, 403: Refused, 404: InvalidInput}
        kinds |= {409: Conflict, 413: InvalidInput}
        return kinds.get(response.status_code, RegrowError)(sentence)


def _job(name: str) -> str:
    return f"/v1/jobs/{quote(name, safe='')}"
