"""Which saves are complete? A step may be committed once every rank of one generation has reported its part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.core.types import SaveReport

COMMIT_TRIES = 3


@dataclass(slots=True)
class Saves:
    """Parts of the newest generation's saves, by step and rank.

    Fenced: parts of another generation than `generation` are refused.
    """

    generation: int = 0
    parts: dict[int, dict[int, SaveReport]] = field(default_factory=dict)
    committing: set[int] = field(default_factory=set)
    failures: dict[int, int] = field(default_factory=dict)
    """Commits that failed, by step; after `COMMIT_TRIES` the step is given up."""

    def begin(self, generation: int) -> None:
        """Forget everything older than `generation`."""
        self.generation = generation
        self.parts.clear()
        self.committing.clear()
        self.failures.clear()

    def add(self, saves: Iterable[SaveReport], newer_than: int) -> None:
        """Take in parts of this generation for steps after `newer_than`."""
        for save in saves:
            given_up = self.failures.get(save.step, 0) >= COMMIT_TRIES
            if save.generation == self.generation and save.step > newer_than and not given_up:
                self.parts.setdefault(save.step, {})[save.rank] = save

    def complete(self, world_size: int) -> list[tuple[int, tuple[SaveReport, ...]]]:
        """Steps that every rank has saved and that are not being committed yet, oldest first, with their parts."""
        ready = []
        for step in sorted(self.parts):
            ranks = self.parts[step]
            if step not in self.committing and set(ranks) == set(range(world_size)):
                ready.append((step, tuple(ranks[rank] for rank in range(world_size))))
        return ready

    def settle(self, step: int, *, committed: bool) -> None:
        """A commit has been answered. Steps up to a committed one need no manifest any more."""
        self.committing.discard(step)
        if not committed:
            self.failures[step] = self.failures.get(step, 0) + 1
        gone = [one for one in self.parts if one == step or (committed and one < step)]
        for one in gone:
            if one not in self.committing:
                del self.parts[one]
