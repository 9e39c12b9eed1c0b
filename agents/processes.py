"""Linux process ties: nothing below the agent outlives what is above it.

Every process sets a parent-death signal on itself first thing after it was forked or executed. The kernel sends it when
the *thread* that created the process dies, so children are created from main threads only. It also reaches processes
that are stopped (SIGSTOP), which no cooperative shutdown would.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

KERNEL_LISTS_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children").exists()
"""False where the kernel was built without CONFIG_PROC_CHILDREN."""

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def die_with_parent(parent: int) -> None:
    """Have the kernel SIGKILL this process when its parent dies; at once when `parent` is not its parent any more."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the new parent of descendants whose own parent dies, so that none can slip away unseen."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_group(group: int) -> bool:
    """SIGKILL every process of the group; False when there is none."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def sweep(reaped: Callable[[int, int], None] | None = None, *, block: bool = False) -> bool:
    """SIGKILL every descendant and reap the dead ones; True when none is left.

    `reaped` gets the pid and exit code (negative = signal) of each. With `block` it returns only when all are gone.
    The caller must have adopted orphans, or grandchildren may escape.
    """
    while True:
        for pid in descendants(os.getpid()):
            _kill(pid)
        try:
            pid, status = os.waitpid(-1, 0 if block else os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return False
        if reaped is not None:
            reaped(pid, os.waitstatus_to_exitcode(status))


def descendants(pid: int) -> list[int]:
    """Pids of all processes below `pid`, dead but unreaped ones included."""
    if not KERNEL_LISTS_CHILDREN:
        return [process.pid for process in psutil.Process(pid).children(recursive=True)]  # looks at every process
    try:
        found = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    except (FileNotFoundError, ProcessLookupError):
        return []  # it is gone
    return found + [below for child in found for below in descendants(child)]


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def signal_name(exit_code: int) -> str:
    """`signal SIGKILL` for -9, `exit 3` for 3."""
    if exit_code >= 0:
        return f"exit {exit_code}"
    try:
        return f"signal {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"signal {-exit_code}"
