"""The routes put together."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route, WebSocketRoute

from orchestrator.core.errors import RegrowError
from orchestrator.server import api
from orchestrator.server.agents import Agents
from orchestrator.server.auth import TokenRequired
from orchestrator.server.events import Events
from orchestrator.server.host import Host


def create_app(host: Host, token: str, closing: asyncio.Event | None = None) -> Starlette:
    """The application around one controller; setting `closing` ends its event streams."""
    handlers = api.Api(host)
    events = Events(host, closing or asyncio.Event())
    one_job = "/v1/jobs/{name}"
    routes = [
        Route("/healthz", handlers.healthz),
        Route("/metrics", handlers.metrics),
        Route("/v1/jobs", handlers.jobs),
        Route("/v1/jobs", handlers.submit, methods=["POST"]),
        Route(one_job, handlers.job),
        Route(f"{one_job}/events", events.endpoint),
        Route(f"{one_job}/stop", handlers.stop, methods=["POST"]),
        Route(f"{one_job}/save", handlers.save, methods=["POST"]),
        Route(f"{one_job}/nodes/{{node}}/drain", handlers.drain, methods=["POST"]),
        Route(f"{one_job}/nodes/{{node}}/undrain", handlers.undrain, methods=["POST"]),
        WebSocketRoute("/v1/agents", Agents(host).endpoint),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TokenRequired, token=token)],
        exception_handlers={
            HTTPException: api.on_http_error,
            RegrowError: api.on_invalid,
            Exception: api.on_defect,
        },
    )
