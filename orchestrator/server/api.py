"""The routes for people and programs. Answers are JSON; an error is `{"error": "one sentence"}`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from orchestrator import jobfile, wire
from orchestrator.core.errors import Conflict, InvalidInput
from orchestrator.core.spec import JobSpec
from orchestrator.server.host import Host

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
"""Longest request body that is read."""


class Api:
    """Handlers of the routes around one controller."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def healthz(self, _: Request) -> Response:
        """`GET /healthz`: the server answers."""
        return PlainTextResponse("ok\n")

    async def metrics(self, _: Request) -> Response:
        """`GET /metrics` in the Prometheus text format."""
        return Response(generate_latest(self._host.metrics_registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def jobs(self, _: Request) -> Response:
        """`GET /v1/jobs`."""
        return JSONResponse({"jobs": [wire.to_data(status) for status in self._host.jobs()]})

    async def job(self, request: Request) -> Response:
        """`GET /v1/jobs/NAME`."""
        return JSONResponse(wire.to_data(self._host.status(found(self._host, request))))

    async def submit(self, request: Request) -> Response:
        """`POST /v1/jobs` with a job file (YAML or JSON; its paths are those of the server's machine)."""
        spec = _job_file(await _body(request))
        await self._host.submit(spec)
        return JSONResponse({"name": spec.name}, 201)

    async def stop(self, request: Request) -> Response:
        """`POST /v1/jobs/NAME/stop`."""
        name = found(self._host, request)
        return await self._ordered(self._host.stop(name), name)

    async def save(self, request: Request) -> Response:
        """`POST /v1/jobs/NAME/save`."""
        name = found(self._host, request)
        return await self._ordered(self._host.save(name), name)

    async def drain(self, request: Request) -> Response:
        """`POST /v1/jobs/NAME/nodes/NODE/drain`."""
        return await self._node(request, self._host.drain)

    async def undrain(self, request: Request) -> Response:
        """`POST /v1/jobs/NAME/nodes/NODE/undrain`."""
        return await self._node(request, self._host.undrain)

    async def _node(self, request: Request, order: Callable[[str, str], Awaitable[None]]) -> Response:
        name, node = found(self._host, request), request.path_params["node"]
        known = [status.node for status in self._host.status(name).nodes]
        if node not in known:
            sentence = f"job {name} has no node {node!r}: its nodes are {', '.join(known) or 'none yet'}"
            raise HTTPException(404, sentence)
        return await self._ordered(order(name, node), name)

    async def _ordered(self, order: Awaitable[None], name: str) -> Response:
        await order
        return JSONResponse({"name": name}, 202)


def found(host: Host, request: Request) -> str:
    """The job's name from the path; raises 404 when there is no such job."""
    name: str = request.path_params["name"]
    try:
        return host.status(name).name
    except InvalidInput as error:
        raise HTTPException(404, str(error)) from error


def _job_file(body: bytes) -> JobSpec:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the job file is not UTF-8 text ({error}): send it as UTF-8") from error
    return jobfile.parse(text, Path.cwd())


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request body is longer than {MAX_BODY_BYTES} bytes: a job file is shorter")
    return bytes(body)


async def on_http_error(request: Request, error: Exception) -> Response:
    """An HTTP error as one sentence."""
    assert isinstance(error, HTTPException)
    sentence = error.detail
    if sentence == HTTPStatus(error.status_code).phrase:  # raised by the routing
        sentence = f"there is no {request.method} {request.url.path} here: check the path and the method"
    return JSONResponse({"error": sentence}, error.status_code, error.headers)


async def on_invalid(_: Request, error: Exception) -> Response:
    """409 for `Conflict`, 400 for any other `RegrowError`, with its sentence."""
    return JSONResponse({"error": str(error)}, 409 if isinstance(error, Conflict) else 400)


async def on_defect(request: Request, error: Exception) -> Response:
    """500 without a traceback: that goes to the controller's log."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse({"error": f"the controller failed at this request ({type(error).__name__}): see its log"}, 500)
