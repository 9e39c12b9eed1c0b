"""The commands that talk to a running controller: `submit`, `status`, `drain`, `undrain`, `save`, `stop`."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Parameter

from orchestrator.cli.options import JobFile, JobName, Json, Node, TokenFile, Url

if TYPE_CHECKING:
    from orchestrator.core.status import JobStatus
    from orchestrator.frontends.client import Client

T = TypeVar("T")
_WATCH = "Follow it until it ends; with --json one object per line."


def submit(job: JobFile, /, *, url: Url = None, token_file: TokenFile = None, json: Json = False) -> None:
    """Start the job that a job file describes. The file is checked here first; its script and folders must exist under
    the same paths on the controller's machine and on the nodes.

    Example: regrow submit job.yaml
    """
    from orchestrator import jobfile

    text = jobfile.dump(jobfile.load(job))
    name = _talk(url, token_file, lambda client: client.submit(text))
    _answer(json, {"name": name}, f"job {name} is accepted: see `regrow status {name} --watch`")


def status(
    name: JobName = None,
    /,
    *,
    watch: Annotated[bool, Parameter(negative="", help=_WATCH)] = False,
    url: Url = None,
    token_file: TokenFile = None,
    json: Json = False,
) -> int:
    """Show a job: phase and reason, nodes, mesh, step, incidents, and the traceback if it FAILED (exit code 7).

    Example: regrow status gpt --watch
    """
    from orchestrator.core.errors import JobFailed

    async def look(client: Client) -> JobStatus:
        one = await client.one_job(name)
        return await _follow(client, one, json) if watch else one

    last = _talk(url, token_file, look)
    if not (watch and json):
        _show(last, json)
    return JobFailed.exit_code if last.failure is not None else 0


def drain(
    node: Node, /, *, job: JobName = None, url: Url = None, token_file: TokenFile = None, json: Json = False
) -> None:
    """Leave a node out: training saves, then goes on without it.

    Example: regrow drain node-2
    """

    async def order(client: Client) -> str:
        name = (await client.one_job(job)).name
        await client.drain(name, node)
        return name

    name = _talk(url, token_file, order)
    _answer(json, {"name": name, "node": node, "drained": True}, f"{node} will be left out of job {name}")


def undrain(
    node: Node, /, *, job: JobName = None, url: Url = None, token_file: TokenFile = None, json: Json = False
) -> None:
    """Use a drained node again.

    Example: regrow undrain node-2
    """

    async def order(client: Client) -> str:
        name = (await client.one_job(job)).name
        await client.undrain(name, node)
        return name

    name = _talk(url, token_file, order)
    _answer(json, {"name": name, "node": node, "drained": False}, f"{node} may be used by job {name} again")


def stop(name: JobName = None, /, *, url: Url = None, token_file: TokenFile = None, json: Json = False) -> None:
    """Save and end a job.

    Example: regrow stop gpt
    """

    async def order(client: Client) -> str:
        found = (await client.one_job(name)).name
        await client.stop(found)
        return found

    found = _talk(url, token_file, order)
    _answer(json, {"name": found}, f"job {found} saves and ends: see `regrow status {found}`")


def save(name: JobName = None, /, *, url: Url = None, token_file: TokenFile = None, json: Json = False) -> None:
    """Have a job save now, between its periodic saves, and train on.

    Example: regrow save gpt
    """

    async def order(client: Client) -> str:
        found = (await client.one_job(name)).name
        await client.save(found)
        return found

    found = _talk(url, token_file, order)
    _answer(json, {"name": found}, f"job {found} saves: see the committed step in `regrow status {found}`")


def _talk(url: str | None, token_file: Path | None, conversation: Callable[[Client], Awaitable[T]]) -> T:
    import asyncio

    from orchestrator import settings
    from orchestrator.frontends.client import Client

    chosen = settings.load()
    token = settings.token(chosen, token_file)

    async def talk() -> T:
        async with Client(url or chosen.url, token) as client:
            return await conversation(client)

    return asyncio.run(talk())


async def _follow(client: Client, last: JobStatus, json: bool) -> JobStatus:
    """Show the job until it ends, also across restarts of the controller; returns its last status."""
    from orchestrator.frontends.view import create_view

    with create_view(quiet=json) as view:
        async for one in client.follow(last.name):
            last = one
            if json:
                _show(one, json)
            else:
                view.show(one)
    return last


def _show(status: JobStatus, json: bool) -> None:
    from rich.console import Console

    from orchestrator import wire
    from orchestrator.frontends.view import render

    if json:
        print(wire.dumps(status), flush=True)
    else:
        Console().print(render(status))


def _answer(json: bool, data: dict[str, object], sentence: str) -> None:
    print(jsonlib.dumps(data) if json else sentence)
