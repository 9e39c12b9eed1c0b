"""Who may talk to the controller: whoever holds its token."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

OPEN_PATHS = frozenset({"/healthz"})
"""Paths that answer without a token."""


def authorized(header: str | None, token: str) -> bool:
    """Whether the `Authorization` header carries the token; takes the same time wherever they differ."""
    scheme, _, given = (header or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


class TokenRequired:
    """Middleware in front of all routes, known or not: no request or WebSocket upgrade passes without the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        if not token:
            raise ValueError("an empty token would let everybody in")
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it with 401."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        if authorized(Headers(scope=scope).get("authorization"), self._token):
            return await self._app(scope, receive, send)
        sentence = "the token is missing or wrong: send the controller's token as `Authorization: Bearer TOKEN`"
        refusal = JSONResponse({"error": sentence}, 401, {"WWW-Authenticate": "Bearer"})
        if scope["type"] == "websocket":
            return await WebSocket(scope, receive, send).send_denial_response(refusal)
        return await refusal(scope, receive, send)
