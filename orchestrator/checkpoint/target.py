"""A folder that appears under its name only when it is whole, and a conversion into it that goes on after a crash.

<parent>/.<name>.partial/            what is being written
<parent>/.<name>.partial/.journal    first line: what it will be; then one line per segment that is written
<parent>/<name>/                     the renamed folder, without journal
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from orchestrator.checkpoint.durable import sync_directory, write_synced
from orchestrator.checkpoint.manifest import digest_of
from orchestrator.checkpoint.stream import BLOCK_BYTES, Limits, OutputFile, Progress, Segment, write_files
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError, Conflict

JOURNAL = ".journal"
"""Name of the file that says what is written already."""
ROOM_BYTES = 1 << 20
"""Free space asked for beyond the files themselves."""

Digests = Mapping[tuple[int, Segment], str]
"""(index of the output file, segment) -> xxh3-128."""


@dataclass(slots=True)
class Partial:
    """A folder that is being written. Only one process has it at a time."""

    directory: Path
    target: Path
    resumed_bytes: int = 0
    """What an earlier attempt had written and this one left as it was."""
    _durable: bool = False
    _journal: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fill(
        self, view: UniversalView, outputs: Sequence[OutputFile], plan: Any, limits: Limits, progress: Progress
    ) -> Digests:
        """Write all files, or what an attempt with the same plan (JSON-able) and source left to write."""
        self._durable = limits.durable
        head = json.dumps({"plan": digest_of(_canonical(plan)), "source": digest_of(_canonical(_stamp(view)))})
        done = self._resume(head, outputs, progress)
        self._require_space(sum(output.size_bytes for output in outputs) - self.resumed_bytes)
        self._journal = (self.directory / JOURNAL).open("a" if done else "w")
        if not done:
            self._journal.write(head + "\n")
        try:
            return write_files(
                view, self.directory, outputs, limits=limits, progress=progress, done=done, record=self._record
            )
        except OSError as error:
            raise CheckpointError(
                f"{self.target} was not written ({error.strerror}): make room or give another folder"
            ) from error
        finally:
            self._journal.close()

    def put(self, name: str, data: bytes) -> None:
        """Write a small file, whole."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(path, data) if self._durable else path.write_bytes(data)

    def publish(self) -> None:
        """Give the folder its name, in one step; first make everything durable where that is asked for."""
        (self.directory / JOURNAL).unlink(missing_ok=True)
        if self._durable:
            for folder, _, names in os.walk(self.directory):
                for name in names:
                    _sync(Path(folder) / name)
                sync_directory(Path(folder))
        try:
            self.directory.rename(self.target)
        except OSError as error:
            raise Conflict(f"{self.target} has appeared meanwhile: give a folder that does not exist") from error
        sync_directory(self.target.parent)

    def _record(self, index: int, segment: Segment, digest: str) -> None:
        line = json.dumps([index, segment.begin, segment.size_bytes, digest])
        with self._lock:
            self._journal.write(line + "\n")
            self._journal.flush()

    def _resume(self, head: str, outputs: Sequence[OutputFile], progress: Progress) -> dict[tuple[int, Segment], str]:
        """What the journal says is written and is still there, byte for byte; forgets another plan's work."""
        try:
            lines = (self.directory / JOURNAL).read_text().splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            lines = []
        if not lines or lines[0] != head:
            _empty(self.directory)
            return {}
        segments = {
            (index, one.begin, one.size_bytes): one for index, output in enumerate(outputs) for one in output.segments
        }
        done: dict[tuple[int, Segment], str] = {}
        for line in lines[1:]:
            entry = _entry(line)
            segment = segments.get(entry[:3]) if entry else None
            if entry and segment and _digest(self.directory / outputs[entry[0]].name, segment) == entry[3]:
                done[entry[0], segment] = entry[3]
        self.resumed_bytes = sum(segment.size_bytes for _, segment in done)
        progress(self.resumed_bytes)
        return done

    def _require_space(self, needed_bytes: int) -> None:
        usage = os.statvfs(self.directory)
        free_bytes = usage.f_bavail * usage.f_frsize
        if free_bytes < needed_bytes + ROOM_BYTES:
            raise CheckpointError(
                f"{self.target.parent} has {free_bytes} bytes free but {needed_bytes + ROOM_BYTES} are needed: make "
                "room or give another folder"
            )


@contextmanager
def partial(target: Path) -> Iterator[Partial]:
    """The folder in which `target` is made. It stays for a later attempt unless it is published.

    Raises `Conflict` when the target exists or another process makes it, `CheckpointError` when it cannot be made.
    """
    target = target.absolute()
    if target.exists():
        raise Conflict(f"{target} exists already: give a folder that does not exist, or remove it")
    directory = target.parent / f".{target.name}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be made ({error.strerror}): give a folder that can be written"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Partial(directory, target)
    except BlockingIOError as error:
        raise Conflict(f"{target} is being written by another process: wait for it or end it") from error
    finally:
        os.close(descriptor)


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _stamp(view: UniversalView) -> Any:
    """What changes when the source does."""
    names = {chunk.file for one in view.tensors.values() for chunk in one.chunks if chunk.file}
    names |= {chunk.file for one in view.tensors.values() for other in one.others for chunk in other if chunk.file}
    return [view.files.location, *([name, view.files.version(name)] for name in sorted(names))]


def _entry(line: str) -> tuple[int, int, int, str] | None:
    """A line of the journal; None for one that a crash cut off."""
    try:
        index, begin, size, digest = json.loads(line)
    except ValueError:
        return None
    return (index, begin, size, digest)


def _digest(path: Path, segment: Segment) -> str | None:
    """The checksum of what lies in the segment's place; None where there is less."""
    hasher = xxhash.xxh3_128()
    block = memoryview(bytearray(min(BLOCK_BYTES, segment.size_bytes)))
    try:
        with path.open("rb", buffering=0) as file:
            position = segment.begin
            while position < segment.end:
                count = os.preadv(file.fileno(), [block[: segment.end - position]], position)
                if count == 0:
                    return None
                hasher.update(block[:count])
                position += count
    except OSError:
        return None
    return hasher.hexdigest()


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
