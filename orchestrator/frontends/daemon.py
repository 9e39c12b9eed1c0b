"""`regrow serve`: the standalone controller on its journal, with its server."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import structlog

from orchestrator import jobfile
from orchestrator.controller.controller import Controller
from orchestrator.core.errors import InvalidInput
from orchestrator.core.spec import JobSpec
from orchestrator.server.serving import listen, serve


def run_daemon(
    job: Path | None,
    *,
    journal: Path,
    host: str,
    port: int,
    descriptor: int | None,
    token: str,
    ready: Callable[[int], None],
) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises `Conflict` when the journal or the port is taken, `InvalidInput` for a bad job file. `descriptor` is an
    already listening socket (as a service manager hands over) and replaces `host` and `port`.
    """
    _log_to_stderr()
    spec = None if job is None else jobfile.load(job)
    listener = listen(host, port) if descriptor is None else _inherited(descriptor)
    asyncio.run(_serve(spec, journal, listener, token, ready))


async def _serve(
    spec: JobSpec | None, journal: Path, listener: socket.socket, token: str, ready: Callable[[int], None]
) -> None:
    controller = Controller.open(journal)
    try:
        if spec is not None and not any(job.name == spec.name and not job.phase.ended for job in controller.jobs()):
            await controller.submit(spec)
        await serve(controller, token, listener, ready)
    finally:
        controller.close()


def _inherited(descriptor: int) -> socket.socket:
    try:
        inherited = socket.socket(fileno=descriptor)
        inherited.listen()
    except OSError as error:
        raise InvalidInput(
            f"--fd {descriptor} is not a listening socket ({error.strerror}): pass one, or --port"
        ) from error
    return inherited


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
