"""One worker: a fork of the warm process that becomes `python script.py args` as far as the script can tell."""

from __future__ import annotations

import atexit
import json
import os
import random
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from agents.processes import die_with_parent
from agents.torchrun.failure import describe, write_error
from orchestrator.core.types import LaunchOrder, expand_arguments


@dataclass(frozen=True, slots=True)
class Forked:
    """A worker as its elastic process knows it; it waits for `release` before it runs the script."""

    rank: int
    local_rank: int
    pid: int
    gate: int
    """Write end of the pipe on which the worker waits for its environment."""

    def release(self, environment: dict[str, str]) -> None:
        """Let the worker run the script with these variables added."""
        with os.fdopen(self.gate, "wb") as gate:
            gate.write(json.dumps(environment).encode() + b"\n")


def fork_worker(order: LaunchOrder, rank: int, local_rank: int, directory: Path, inherited: Sequence[int]) -> Forked:
    """Fork a worker that waits for its release; `inherited` are file descriptors it must not keep.

    Called before the elastic process opens its store: a fork of a process with more threads than one may copy locks
    that nobody will ever release.
    """
    parent = os.getpid()
    waiting, gate = os.pipe()
    pid = os.fork()
    if pid == 0:
        for fd in (gate, *inherited):
            os.close(fd)
        _main(parent, order, rank, directory, waiting)
    os.close(waiting)
    return Forked(rank, local_rank, pid, gate)


def _main(parent: int, order: LaunchOrder, rank: int, directory: Path, gate: int) -> NoReturn:
    code = 1
    try:
        die_with_parent(parent)
        _follow_parent_in_children()
        _reset_signals()
        _redirect(directory / f"worker-{rank}.log")
        environment = _wait(gate)
        code = _run(order, rank, directory, environment)
    except BaseException:
        traceback.print_exc()  # into the log of the warm process, when there is none of one's own yet
        _flush()
    finally:
        os._exit(code)


def _follow_parent_in_children() -> None:
    """Processes that the script forks from its main thread (data loaders) die with it, too."""

    def before() -> None:
        forker.main = threading.current_thread() is threading.main_thread()
        forker.pid = os.getpid()

    def after() -> None:
        if forker.main:
            die_with_parent(forker.pid)

    forker = threading.local()
    os.register_at_fork(before=before, after_in_child=after)


def _reset_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _redirect(log: Path) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # TextIOWrapper since start-up


def _wait(gate: int) -> dict[str, str]:
    with os.fdopen(gate, "rb") as pipe:
        line = pipe.readline()
    if not line:  # the elastic process died: so does this one, any moment
        os._exit(1)
    environment: dict[str, str] = json.loads(line)
    return environment


def _run(order: LaunchOrder, rank: int, directory: Path, environment: dict[str, str]) -> int:
    """Run the script; returns the exit code that `python script.py` would have."""
    try:
        _become_script(order, environment)
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leave:
        code = _exit_code(leave)
    except BaseException as error:
        failure = describe(error, rank)
        with suppress(OSError):  # a full disk: the log may still have room
            write_error(directory, failure)
        sys.stderr.write(failure.traceback)
        _flush()
        return 1  # at once: threads that wait for lost peers would never be joined
    else:
        code = 0
    _finish()
    return code


def _become_script(order: LaunchOrder, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(order.entrypoint.working_directory)
    script = Path(order.entrypoint.script).absolute()  # processes that the script spawns look for it, too
    sys.argv = [str(script), *expand_arguments(order.entrypoint.args, order.generation.plan)]
    if not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    _adopt_python_path(environment)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) != torch.get_num_threads():
        torch.set_num_threads(int(threads))  # torch read the variable before the job was known
    _reseed()


def _adopt_python_path(environment: dict[str, str]) -> None:
    folders = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[1:1] = [folder for folder in folders if folder not in sys.path]


def _reseed() -> None:
    """Give the process random states of its own: all forks of one process share theirs."""
    random.seed()
    torch.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def _exit_code(leave: SystemExit) -> int:
    if leave.code is None:
        return 0
    if isinstance(leave.code, int):
        return leave.code & 0xFF
    sys.stderr.write(f"{leave.code}\n")
    return 1


def _finish() -> None:
    """What the interpreter does when a script ends: join threads, run exit handlers, flush.

    Returning through the frames of the warm process instead would run their clean-up in the wrong process.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does after a fork
    atexit._run_exitfuncs()
    _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # a full disk or a closed stream must not hide how the script ended
