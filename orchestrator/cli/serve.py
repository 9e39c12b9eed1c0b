"""`regrow serve`."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from orchestrator.cli.options import Json

_NEW_TOKEN = "File with the token; a random one is written if it does not exist. Else REGROW_TOKEN."  # noqa: S105
_FD = "Listen on this inherited socket instead of --host and --port."
_JOB = "Job file to start with, unless the journal already holds that job."


def serve(
    job: Annotated[Path | None, Parameter(help=_JOB)] = None,
    /,
    *,
    host: Annotated[str, Parameter(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port to listen on; 0 = a free one, printed.")] = 7470,
    fd: Annotated[int | None, Parameter(help=_FD)] = None,
    journal: Annotated[Path, Parameter(help="The controller's memory: one controller per file.")] = Path(
        "regrow-journal.sqlite3"
    ),
    token_file: Annotated[Path | None, Parameter(help=_NEW_TOKEN)] = None,
    json: Json = False,
) -> None:
    """Run the controller and its server until SIGTERM; a restart on the same journal goes on where it ended.

    Example: regrow serve job.yaml --journal gpt.sqlite3 --token-file token
    """
    from orchestrator import settings
    from orchestrator.frontends.daemon import run_daemon

    if token_file is not None:
        settings.create_token(token_file)
    token = settings.token(settings.load(), token_file)

    def ready(real_port: int) -> None:
        url = f"http://{f'[{host}]' if ':' in host else host}:{real_port}"
        print(jsonlib.dumps({"url": url}) if json else f"regrow listens on {url}", flush=True)

    run_daemon(job, journal=journal, host=host, port=port, descriptor=fd, token=token, ready=ready)
