"""Writing so that a crash at any point leaves the old file or the new one, and the lock that orders writers."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.core.errors import CheckpointError

LOCK = "lock"
"""Name of the lock file under the root."""


def temporary(path: Path) -> Path:
    """Where this process writes what is then renamed to `path`; what a crash leaves there is never read."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and make its contents durable."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one atomic step, durable when this returns. Only under the exclusive lock.

    What a crash leaves behind has a fixed name, so that the next attempt writes over it.
    """
    written = path.with_name(f".{path.name}.tmp")
    write_synced(written, data)
    written.replace(path)
    sync_directory(path.parent)


@contextmanager
def locked(root: Path, *, shared: bool = False, patience_s: float = 30.0) -> Iterator[None]:
    """Hold the root's lock: exclusive for what decides about a checkpoint, shared for putting a part in place.

    The kernel drops it when the process dies. Raises `CheckpointError` when it is not free within `patience_s`: its
    holders need milliseconds, so one that keeps it is stopped or on a host that is gone.
    """
    try:
        descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint lock {root / LOCK} cannot be opened ({error.strerror}): make the directory writable"
        ) from error
    try:
        _acquire(root, descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, time.monotonic() + patience_s)
        try:
            yield
        finally:
            # Closing is not enough: a child that another thread forked meanwhile has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _acquire(root: Path, descriptor: int, mode: int, deadline_s: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline_s:
                raise CheckpointError(
                    f"checkpoint directory {root} is locked by another process: end the one that holds {root / LOCK}"
                ) from error
        except OSError as error:
            raise CheckpointError(
                f"checkpoint directory {root} cannot be locked ({error.strerror}): mount it with file locks"
            ) from error
        time.sleep(0.005)
