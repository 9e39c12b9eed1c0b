"""Is a worker process held: stopped by a signal or a debugger, or stuck in uninterruptible sleep?"""

from __future__ import annotations

import psutil

STUCK_LOOKS = 4
"""Consecutive looks in uninterruptible sleep before it counts: a single one is any disk access."""


class HeldProbe:
    """Looks at processes by pid, and remembers for how many looks each was in uninterruptible sleep."""

    def __init__(self) -> None:
        self._asleep: dict[int, int] = {}

    def look(self, pid: int) -> bool:
        """True when the process is held now; False when it is not, or is gone."""
        try:
            status = psutil.Process(pid).status()
        except psutil.Error:
            return False
        self._asleep[pid] = self._asleep.get(pid, 0) + 1 if status == psutil.STATUS_DISK_SLEEP else 0
        return status in {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP} or self._asleep[pid] >= STUCK_LOOKS

    def forget(self) -> None:
        """Forget all processes: their launch has ended."""
        self._asleep.clear()
