"""The journal: facts made durable in order. SQLite in WAL mode for daemons, a list for tests and simulations.

One controller per journal: the file is locked for as long as it is open.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from orchestrator import wire
from orchestrator.core.errors import Conflict, InvalidInput
from orchestrator.core.facts import Fact, JobAccepted

SCHEMA = "CREATE TABLE IF NOT EXISTS facts (seq INTEGER PRIMARY KEY, time_s REAL NOT NULL, body TEXT NOT NULL)"


class Journal(Protocol):
    """Where facts are kept."""

    def append(self, facts: Sequence[Fact]) -> None:
        """Make the facts durable, all or none; returns only then."""

    def load(self) -> list[Fact]:
        """Facts of the newest job, oldest first."""

    def close(self) -> None:
        """Release the journal for another controller."""


class MemoryJournal:
    """Facts in a list: for tests and for the simulator."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []

    def append(self, facts: Sequence[Fact]) -> None:
        """Keep the facts."""
        self.facts.extend(facts)

    def load(self) -> list[Fact]:
        """Facts of the newest job."""
        return newest_job(self.facts)

    def close(self) -> None:
        """Nothing to release."""


class SqliteJournal:
    """Facts in one SQLite file (WAL, `synchronous=FULL`: an append returns after the disk has it).

    Raises `Conflict` when another controller holds the file and `InvalidInput` when it is not a journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = self._take_lock()
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(SCHEMA)
        except sqlite3.Error as error:
            os.close(self._lock)
            raise InvalidInput(f"{path} cannot be used as a journal ({error}): name another file") from error

    def _take_lock(self) -> int:
        name = self.path.with_name(self.path.name + ".lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidInput(f"journal {self.path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise Conflict(
                f"another controller (process {holder}) holds the journal {self.path}: "
                "stop it, or give this controller a journal of its own"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        return lock

    def append(self, facts: Sequence[Fact]) -> None:
        """Make the facts durable in one transaction."""
        rows = [(fact.time_s, wire.dumps(fact, Fact)) for fact in facts]
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._database.executemany("INSERT INTO facts (time_s, body) VALUES (?, ?)", rows)
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def load(self) -> list[Fact]:
        """Facts of the newest job; raises `InvalidInput` when a row cannot be read."""
        facts: list[Fact] = []
        try:
            for seq, body in self._database.execute("SELECT seq, body FROM facts ORDER BY seq"):
                try:
                    facts.append(wire.loads(body, Fact))
                except InvalidInput as error:
                    raise InvalidInput(f"journal {self.path}, row {seq}: {error}") from error
        except sqlite3.Error as error:
            raise InvalidInput(f"journal {self.path} cannot be read: {error}") from error
        return newest_job(facts)

    def close(self) -> None:
        """Close the file and give up the lock."""
        self._database.close()
        os.close(self._lock)


def newest_job(facts: Sequence[Fact]) -> list[Fact]:
    """The facts from the last `JobAccepted` on."""
    starts = [index for index, fact in enumerate(facts) if isinstance(fact, JobAccepted)]
    return list(facts[starts[-1] :]) if starts else []
