"""Saving without a collective: copy the local chunks (training stands still), then write them from a thread."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.layout import Piece
from orchestrator.core.errors import RegrowError
from orchestrator.core.types import SaveReport
from orchestrator.trainer.chunks import Snapshot, chunks
from orchestrator.trainer.layouts import Layouts
from orchestrator.trainer.state import Tracked


class Saver:
    """Writes this rank's part of a checkpoint; at most one write is under way.

    A failed write (a full disk) is told on stderr and skipped: it must not end training. `last_step` is the newest step
    whose part is durably written.
    """

    def __init__(
        self,
        root: str,
        *,
        generation: int,
        rank: int,
        world_size: int,
        layouts: Layouts,
        report: Callable[[SaveReport], None],
    ) -> None:
        self._root = root
        self._generation, self._rank, self._world_size = generation, rank, world_size
        self._layouts = layouts
        self._report = report
        self._snapshot = Snapshot()
        self._preparation: threading.Thread | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.last_step: int | None = None

    @property
    def writing(self) -> bool:
        """Whether a write is under way."""
        return self._thread is not None and self._thread.is_alive()

    def prepare(self, tracked: Tracked) -> None:
        """Allocate the snapshot in the background, once the optimizer has its states, so that no save stalls for it."""
        chosen = chunks(tracked.entries(), self._layouts)
        size_bytes = chosen[-1].start + chosen[-1].size_bytes if chosen else 0
        self._preparation = threading.Thread(target=self._snapshot.reserve, args=(size_bytes,), daemon=True)
        self._preparation.start()

    def save(self, tracked: Tracked, step: int, state: dict[str, Any]) -> None:
        """Copy the state after `step` and start writing it; waits for an earlier write."""
        self.wait()
        began = time.perf_counter()
        if self._preparation is not None:
            self._preparation.join()
        pieces = self._snapshot.copy(chunks(tracked.entries(), self._layouts))
        stall_s = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(step, pieces, state, stall_s), name="regrow-saver", daemon=True
        )
        self._thread.start()

    def wait(self) -> Exception | None:
        """Return when no write is under way; the error of the last one, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._error

    def _write(self, step: int, pieces: list[Piece], state: dict[str, Any], stall_s: float) -> None:
        self._error = None
        try:
            report = native.write_part(
                self._root,
                generation=self._generation,
                step=step,
                rank=self._rank,
                world_size=self._world_size,
                pieces=pieces,
                state=state,
                stall_s=stall_s,
            )
        except (RegrowError, OSError) as error:
            self._error = error
            print(f"regrow: step {step} was not saved by rank {self._rank}: {error}", file=sys.stderr, flush=True)
            return
        self.last_step = step
        self._report(report)
