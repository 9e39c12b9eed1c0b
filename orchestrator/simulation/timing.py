"""How long things take in the simulated cluster. Every figure can be set; the defaults have sources."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, and what they depend on."""

    detect_s: float = 5.0
    """Until a failure that shows itself is known: the survivors' collectives break and the connection is closed."""
    hang_s: float = 120.0
    """Until a silent one is known: `hangAfter`, ten steps of a large job."""
    plan_s: float = 0.5
    """A plan for 16,384 devices takes less (`make bench`)."""
    convert_s: float = 20.0
    """Until the checkpoint is checked and prepared."""
    launch_s: float = 15.0
    """Until workers are started, at any size."""
    connect_s: float = 60.0
    """Communicators and rendezvous at 16,384 devices, growing with their number to the power of 0.7: NCCL's start took
    17 s at 16,000, 100 s at 64,000 (arXiv:2602.00277, figure 2), and the whole of a cold recovery 200 s."""
    restore_s: float = 60.0
    """Reading the state from storage."""
    first_step_s: float = 40.0
    """Beyond a usual step: compilation, warm-up of caches and allocators."""
    stall_s: float = 1.0
    """Training stands still for this long at each save (copy into host memory)."""
    write_s: float = 60.0
    """Until a save is committed; training goes on meanwhile."""

    def restart_s(self, devices: int) -> float:
        """From the order to launch until the first step is done."""
        connect_s = self.connect_s * math.pow(max(1, devices) / 16384, 0.7)
        return self.launch_s + connect_s + self.restore_s + self.first_step_s
