"""Where the time of a simulated job went. The shares are of one whole: they add up to it."""

from __future__ import annotations

from dataclasses import dataclass, field

USEFUL = "useful"
CAUSES = (
    USEFUL,
    "lost work",
    "checkpoint stall",
    "detection",
    "decision",
    "waiting",
    "conversion",
    "restart",
    "degraded capacity",
    "idle spares",
)
"""`useful`: what was trained and kept, in seconds of all nodes' full speed. `degraded capacity`: speed that is missing
while fewer devices train, or an unfavourable number of them; `idle spares`: the same, of nodes that are held back."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Uninterrupted training of `elapsed_s` seconds that saves every `every_s` seconds of training."""

    elapsed_s: float
    every_s: float
    stall_s: float
    write_s: float

    @property
    def trained_s(self) -> float:
        """Without stalls."""
        cycles, rest_s = divmod(self.elapsed_s, self.every_s + self.stall_s)
        return cycles * self.every_s + min(rest_s, self.every_s)

    @property
    def saves(self) -> int:
        """Saves that were committed."""
        return max(0, int((self.elapsed_s - self.write_s) // (self.every_s + self.stall_s)))

    @property
    def kept_s(self) -> float:
        """Trained before the last committed save."""
        return self.saves * self.every_s

    @property
    def committed_at_s(self) -> float:
        """When the last save was committed, from the beginning."""
        return self.saves * (self.every_s + self.stall_s) + self.write_s


@dataclass(slots=True)
class Account:
    """Seconds by cause."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    interruptions: int = 0
    """Times that training stopped for a reason that nobody planned."""
    changes: int = 0
    """Planned changes: drains and growth."""

    def spend(self, cause: str, seconds: float) -> None:
        """`seconds` of the job's time went there."""
        self.seconds[cause] += seconds

    def train(self, stretch: Stretch, speed: float, held_back: float, *, graceful: bool) -> None:
        """A stretch of training at `speed` of all nodes' full speed, of which `held_back` is missing by choice.

        `graceful`: it ended with a save, so that nothing is lost.
        """
        kept_s = stretch.trained_s if graceful else stretch.kept_s
        self.spend(USEFUL, kept_s * speed)
        self.spend("idle spares", kept_s * held_back)
        self.spend("degraded capacity", kept_s * (1 - speed - held_back))
        self.spend("lost work", stretch.trained_s - kept_s)
        self.spend("checkpoint stall", stretch.elapsed_s - stretch.trained_s)

    @property
    def total_s(self) -> float:
        """All of it."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of what all nodes given would have trained."""
        return self.seconds[USEFUL] / self.total_s if self.total_s else 0.0

    @property
    def ettr(self) -> float:
        """Effective training time ratio: share of the time in which training made progress that was kept, however fast
        (arXiv:2410.21680).
        """
        kept = sum(self.seconds[name] for name in (USEFUL, "idle spares", "degraded capacity"))
        return kept / self.total_s if self.total_s else 0.0

    def shares(self) -> dict[str, float]:
        """By cause; they sum to 1."""
        return {name: seconds / self.total_s if self.total_s else 0.0 for name, seconds in self.seconds.items()}
