"""Server-sent events: the status of a job whenever it changes."""

from __future__ import annotations

import asyncio
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from orchestrator import wire
from orchestrator.core.errors import InvalidInput
from orchestrator.core.status import JobStatus
from orchestrator.server.api import found
from orchestrator.server.host import Host

INTERVAL_S = 0.2
"""Least time between two events of one phase, unless the request asks for another."""
KEEP_ALIVE_S = 10.0
"""A comment is sent when nothing has changed for this long, so that a dead reader is noticed."""


class Events:
    """`GET /v1/jobs/NAME/events?interval_s=0.2`; ends when `closing` is set."""

    def __init__(self, host: Host, closing: asyncio.Event) -> None:
        self._host = host
        self._closing = closing

    async def endpoint(self, request: Request) -> Response:
        """Answer with the stream."""
        name = found(self._host, request)
        stream = self._events(name, _interval_s(request))
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _events(self, name: str, interval_s: float) -> AsyncIterator[str]:
        last: JobStatus | None = None
        closing = asyncio.create_task(self._closing.wait())
        changed = asyncio.create_task(self._host.changed())
        try:
            while not closing.done():
                await asyncio.sleep(0)  # `changed` listens before the status is read: no change falls in between
                status = self._host.status(name)
                if last is None or replace(status, time_s=last.time_s) != last:
                    pace_s = 0.0 if last is None or status.phase is not last.phase else interval_s
                    last = status
                    yield f"data: {wire.dumps(status)}\n\n"
                    await asyncio.wait([closing], timeout=pace_s)
                done, _ = await asyncio.wait([changed, closing], timeout=KEEP_ALIVE_S, return_when=FIRST_COMPLETED)
                if changed in done:
                    changed = asyncio.create_task(self._host.changed())
                elif not done:
                    yield ": nothing has changed\n\n"
        finally:
            closing.cancel()
            changed.cancel()
            await asyncio.gather(closing, changed, return_exceptions=True)


def _interval_s(request: Request) -> float:
    text = request.query_params.get("interval_s", str(INTERVAL_S))
    try:
        interval_s = float(text)
    except ValueError:
        interval_s = -1.0
    if not 0.01 <= interval_s <= 60.0:
        raise InvalidInput(f"interval_s is {text!r} but must be a number of seconds between 0.01 and 60")
    return interval_s
