"""Where the bytes of a checkpoint are: a folder of files that are read by ranges."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from orchestrator.checkpoint.fields import corrupt
from orchestrator.core.errors import CheckpointError

MAX_OPEN_FILES = 256
"""Files kept open at a time; the one used longest ago is closed first."""
BLOCK_BYTES = 512 << 10
"""Read at a time by `read_blocks`: small enough to be hashed while it is in cache."""
MAX_METADATA_BYTES = 1 << 29
"""A metadata file larger than this is not read: it is not one."""


class Files(Protocol):
    """Files by name relative to one place. Safe to use from several threads.

    Reading beyond a file's end raises `CorruptCheckpoint`, as does a file that is missing; every error names the file.
    """

    @property
    def location(self) -> str:
        """The place, as errors and reports name it."""

    def names(self) -> frozenset[str]:
        """All files below it, with `/` between folders. What a checkpoint names is read only if it is among these."""

    def size(self, file: str) -> int:
        """Bytes of the file."""

    def version(self, file: str) -> str:
        """What changes when the file's contents do: size and time of change, or an object's tag."""

    def read_into(self, file: str, begin: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `begin` on."""

    def span(self, file: str, begin: int, count: int) -> memoryview:
        """The bytes `begin .. begin + count`, without a copy where that can be."""

    def label(self, file: str) -> str:
        """How errors name the file."""


def folder_name(files: Files) -> str:
    """The last part of the files' location."""
    return files.location.rstrip("/").rpartition("/")[2]


def read_whole(files: Files, file: str, limit_bytes: int = MAX_METADATA_BYTES) -> bytes:
    """All bytes of a metadata file; raises `CorruptCheckpoint` when it is larger than `limit_bytes`."""
    count = files.size(file)
    if count > limit_bytes:
        raise corrupt(
            files.label(file), f"it has {count} bytes, more than the {limit_bytes} that are read of such a file"
        )
    data = bytearray(count)
    files.read_into(file, 0, memoryview(data))
    return bytes(data)


def read_blocks(files: Files, file: str, begin: int, end: int) -> Iterator[memoryview]:
    """Bytes `begin .. end` piece by piece; each is valid until the next is asked for."""
    block = memoryview(bytearray(min(BLOCK_BYTES, end - begin)))
    while begin < end:
        piece = block[: end - begin]
        files.read_into(file, begin, piece)
        yield piece
        begin += piece.nbytes


class NotRegular(OSError):
    """A folder, pipe or device where a file is expected."""


def open_regular(path: Path) -> int:
    """A descriptor to read the file; raises `NotRegular` for what is none, without waiting for it.

    A stranger's checkpoint may hold a pipe, on which opening waits for ever, or a link to a device, which never ends.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular(errno.EINVAL, "it is not a regular file")
    return descriptor


class _Handle:
    """An open file, closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = open_regular(path)
        self.mapped: mmap.mmap | None = None

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "descriptor"):
            close(self.descriptor)  # at the end of the interpreter the module's names may be gone


class LocalFiles:
    """A directory, or `only` one file of it. `bytes_read` counts what was asked of the kernel, for benchmarks."""

    def __init__(self, directory: Path, only: str | None = None) -> None:
        self.directory = directory
        self.bytes_read = 0
        self._open: OrderedDict[str, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._only = only
        self._names: frozenset[str] | None = None if only is None else frozenset({only})

    @property
    def location(self) -> str:
        """The directory or file."""
        return str(self.directory if self._only is None else self.directory / self._only)

    def names(self) -> frozenset[str]:
        """All regular files below the directory (through links to files, not through links to folders); listed once."""
        if self._names is None:
            found = []
            for folder, _, entries in os.walk(self.directory, onerror=_unlisted):
                prefix = "" if folder == str(self.directory) else os.path.relpath(folder, self.directory) + "/"
                found += [prefix + entry for entry in entries]
            self._names = frozenset(found)
        return self._names

    def size(self, file: str) -> int:
        """Bytes of the file."""
        return self._stat(file).st_size

    def version(self, file: str) -> str:
        """Size and time of change."""
        found = self._stat(file)
        return f"{found.st_size}-{found.st_mtime_ns}"

    def read_into(self, file: str, begin: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `begin` on."""
        handle = self._handle(file)
        done = 0
        try:
            while done < target.nbytes:
                count = os.preadv(handle.descriptor, [target[done:]], begin + done)
                if count == 0:
                    raise corrupt(self.label(file), f"it ends at byte {begin + done}")
                done += count
        except (OSError, OverflowError) as error:
            raise _unreadable(self.directory / file, error) from error
        self.bytes_read += done

    def span(self, file: str, begin: int, count: int) -> memoryview:
        """The bytes as a map of the file; the map lives as long as the memory view."""
        handle = self._handle(file)
        size = os.fstat(handle.descriptor).st_size
        if begin + count > size:
            raise corrupt(self.label(file), f"it ends at byte {size}")
        if count == 0:
            return memoryview(b"")
        if handle.mapped is None or len(handle.mapped) < begin + count:
            handle.mapped = mmap.mmap(handle.descriptor, size, prot=mmap.PROT_READ)
        return memoryview(handle.mapped)[begin : begin + count]

    def label(self, file: str) -> str:
        """The file with its directory's name."""
        return f"{self.directory.name}/{file}"

    def _stat(self, file: str) -> os.stat_result:
        """Of the file as it was opened, else as it is now; sizes of a thousand files are asked for, few are read."""
        with self._lock:
            handle = self._open.get(file)
        if handle is not None:
            return os.fstat(handle.descriptor)
        with self._naming(file):
            found = (self.directory / file).stat()
            if not stat.S_ISREG(found.st_mode):
                raise NotRegular(errno.EINVAL, "it is not a regular file")
            return found

    @contextmanager
    def _naming(self, file: str) -> Iterator[None]:
        """Errors of the system as ours, which name the file."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise corrupt(self.label(file), "it is missing") from error
        except NotRegular as error:
            raise corrupt(self.label(file), "it is not a regular file") from error
        except (OSError, ValueError) as error:
            raise _unreadable(self.directory / file, error) from error

    def _handle(self, file: str) -> _Handle:
        with self._lock:
            handle = self._open.get(file)
            if handle is not None:
                self._open.move_to_end(file)
                return handle
            with self._naming(file):
                handle = _Handle(self.directory / file)
            self._open[file] = handle
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)
            return handle


def _unlisted(error: OSError) -> None:
    raise _unreadable(Path(error.filename), error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or str(error)
    return CheckpointError(f"checkpoint file {path} cannot be read ({reason}): make it readable")
