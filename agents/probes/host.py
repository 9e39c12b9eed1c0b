"""Readings of the host: processor, memory, disk and the agent itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from orchestrator.core.types import Probes

FRESH_S = 1.0
"""Readings younger than this are used again."""


class HostProbe:
    """Reads the host at most once per `FRESH_S`; `directory` tells which disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process = psutil.Process()
        self._read_s = 0.0
        self._probes = Probes()
        psutil.cpu_percent()  # the first call only sets the starting point

    def read(self) -> Probes:
        """The newest readings."""
        now_s = time.monotonic()
        if now_s - self._read_s >= FRESH_S:
            self._read_s, self._probes = now_s, self._measure()
        return self._probes

    def _measure(self) -> Probes:
        memory = psutil.virtual_memory()
        return Probes(
            cpu_percent=psutil.cpu_percent(),
            load_1m=os.getloadavg()[0],
            memory_available_bytes=memory.available,
            memory_total_bytes=memory.total,
            disk_free_bytes=self._disk_free_bytes(),
            agent_rss_bytes=self._process.memory_info().rss,
        )

    def _disk_free_bytes(self) -> int:
        try:
            return psutil.disk_usage(str(self._directory)).free
        except OSError:
            return 0
