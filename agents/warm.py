"""The agent's side of the warm process (`agents.torchrun.zygote`): starts it, commands it, replaces it when it dies."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from agents.processes import signal_name, sweep
from agents.settings import TOKEN_VARIABLE

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 5.0


class WarmProcess:
    """Keeps one warm process alive while `run` runs.

    `heard` gets each of its events, and `{"event": "died", "exit_code": c, "reason": text}` once it and everything
    below it is gone.
    """

    def __init__(self, directory: Path, preload: str | None, heard: Callable[[dict[str, Any]], None]) -> None:
        self.log_path = directory / "warm.log"
        self._preload = preload
        self._heard = heard
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.warm = False
        """True when a launch would start at once."""

    @property
    def pid(self) -> int | None:
        """Process id while there is a process."""
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Until cancelled."""
        retry_s = FIRST_RETRY_S
        try:
            while True:
                reader = await self._start()
                await self._listen(reader)
                retry_s = FIRST_RETRY_S if self.warm else min(2 * retry_s, LAST_RETRY_S)
                await self._bury()
                await asyncio.sleep(retry_s)
        finally:
            await self._end()

    def launch(self, **launch: str) -> None:
        """Fork an elastic process; only while `warm`."""
        assert self._writer is not None
        self._writer.write(json.dumps({"launch": launch}).encode() + b"\n")

    def kill(self) -> None:
        """SIGKILL it; everything below dies with it."""
        if self._process is not None:
            self._process.kill()

    async def _start(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        with theirs, self.log_path.open("ab") as output:
            # Not asyncio's: the death signal follows the thread that forks, which must be the main one.
            self._process = subprocess.Popen(  # noqa: ASYNC220  # a fork and no waiting
                self._command(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE},
            )
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        return reader

    def _command(self, fd: int) -> list[str]:
        command = [sys.executable, "-m", "agents.torchrun.zygote", "--commands", str(fd), "--parent", str(os.getpid())]
        return command if self._preload is None else [*command, "--preload", self._preload]

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while line := await reader.readline():
                event = json.loads(line)
                self.warm = self.warm or event["event"] == "warm"
                self._heard(event)

    async def _end(self) -> int:
        """Kill the process and all below it, wait until they are gone; the exit code of the process."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.kill()
        while process.poll() is None:  # noqa: ASYNC110  # the kernel sets no event
            await asyncio.sleep(0.002)
        while not sweep():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        return process.returncode

    async def _bury(self) -> None:
        assert self._writer is not None
        was_warm, self.warm = self.warm, False
        self._writer.close()
        exit_code = await self._end()
        doing = "while it was ready" if was_warm else f"while importing ({self._last_line()})"
        reason = f"the warm process ended with {signal_name(exit_code)} {doing}"
        log.warning("%s; starting another one", reason)
        self._heard({"event": "died", "exit_code": exit_code, "reason": reason})

    def _last_line(self) -> str:
        lines = self.log_path.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
