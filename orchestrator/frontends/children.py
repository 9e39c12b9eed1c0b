"""Child processes that cannot outlive this one, and the sweep that proves it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)
_adopting = [False]


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that `descendants` misses none."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot adopt orphaned processes (PR_SET_CHILD_SUBREAPER)")
    _adopting[0] = True


def _dying_with(parent: int) -> Callable[[], None]:
    """What a fresh child does first: ask for SIGKILL when its parent dies, and die if it has died meanwhile."""

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


class Child:
    """One child process, started again under the same name as often as wanted; its output goes to a log file.

    Start it from the main thread: the kernel ties the parent-death signal to the thread that forked.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, fds: Sequence[int] = ()
    ) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._environment = environment
        self._fds = fds
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0

    def start(self) -> None:
        """Start it; appends to the log."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=self._fds,
                preexec_fn=_dying_with(os.getpid()),  # noqa: PLW1509 - no other thread exists here
            )
        self._started_s = time.monotonic()

    @property
    def alive(self) -> bool:
        """Whether it runs now."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Exit status of the last start; negative = killed by that signal."""
        return None if self._process is None else self._process.poll()

    @property
    def age_s(self) -> float:
        """Seconds since it was last started."""
        return time.monotonic() - self._started_s

    @property
    def pid(self) -> int | None:
        """Process id while it is alive."""
        return self._process.pid if self._process is not None and self.alive else None

    def send(self, number: signal.Signals) -> None:
        """Signal it, if it is alive."""
        if self._process is not None:
            self._process.send_signal(number)

    def descendants(self) -> list[psutil.Process]:
        """Every process below it now."""
        return [] if self.pid is None else descendants(self.pid)

    def kill(self) -> None:
        """SIGKILL it and everything below it, as when its machine loses power."""
        below = self.descendants()
        self.send(signal.SIGKILL)
        kill(below)
        if self._process is not None:
            self._process.wait()

    def last_words(self) -> str:
        """The last line of its log that says something."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1].strip() if lines else "its log is empty"


def descendants(pid: int) -> list[psutil.Process]:
    """Every process below `pid`, zombies left out."""
    try:
        return [process for process in psutil.Process(pid).children(recursive=True) if _lives(process)]
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL; whoever is gone already is fine."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def sweep(deadline_s: float = 5.0) -> list[psutil.Process]:
    """Kill whatever is left below this process until nothing is; returns what would not die."""
    end_s = time.monotonic() + deadline_s
    while (left := descendants(os.getpid())) and time.monotonic() < end_s:
        kill(left)
        reap()
        time.sleep(0.02)
    return left


def reap(keep: Iterable[int] = ()) -> None:
    """Collect the exit status of adopted orphans; `keep` are children that somebody else waits for."""
    if not _adopting[0]:
        return
    known = set(keep)
    for process in psutil.Process().children():
        try:
            if process.pid not in known and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
