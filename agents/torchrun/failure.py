"""From an exception in a training script to the error file that its agent reads."""

from __future__ import annotations

import os
import runpy
import time
import traceback
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from orchestrator import wire
from orchestrator.core.types import WorkerError

_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "Socket closed",
    "connectFullMesh",
    "NCCL communicator was aborted",
    "ncclRemoteError",
)
"""What gloo's and NCCL's plain RuntimeErrors say when a peer went away."""


def is_collective(error: BaseException) -> bool:
    """True when `error` only says that a peer went away.

    The innermost exception of the chain decides: what is raised while cleaning up after a ValueError is no news, and a
    failed collective stays one however it is wrapped.
    """
    innermost = _innermost(error)
    if isinstance(innermost, dist.DistError):
        return True
    text = str(innermost)
    names_transport = "gloo" in text or "NCCL" in text or "nccl" in text or "TCPStore" in text
    return isinstance(innermost, RuntimeError) and names_transport and any(phrase in text for phrase in _PEER_GONE)


def _innermost(error: BaseException) -> BaseException:
    seen = {id(error)}
    while True:
        inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if inner is None or id(inner) in seen:
            return error
        seen.add(id(inner))
        error = inner


def describe(error: BaseException, rank: int) -> WorkerError:
    """The error as the controller sees it; the agent fills in the step."""
    return WorkerError(
        rank=rank,
        exception=type(error).__name__,
        message=str(error),
        traceback=script_traceback(error),
        step=0,
        time_s=time.time(),
        collective=is_collective(error),
    )


def script_traceback(error: BaseException) -> str:
    """The traceback as plain `python script.py` would print it, without the frames that launched the script."""
    return "".join(traceback.format_exception(type(error), error, _from_script(error.__traceback__)))


def _from_script(trace: TracebackType | None) -> TracebackType | None:
    launchers = {runpy.__file__, "<frozen runpy>", str(Path(__file__).with_name("worker.py"))}
    while trace is not None and trace.tb_frame.f_code.co_filename in launchers:
        trace = trace.tb_next
    return trace


def error_path(directory: Path, rank: int) -> Path:
    """Where the worker of `rank` leaves its error."""
    return directory / f"error-{rank}.json"


def write_error(directory: Path, error: WorkerError) -> None:
    """Write the error file atomically; a reader sees all of it or nothing."""
    path = error_path(directory, error.rank)
    part = path.with_suffix(f".{os.getpid()}.tmp")
    part.write_text(wire.dumps(error))
    part.replace(path)
