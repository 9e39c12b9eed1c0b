"""Rankings that were made ahead: a plan for nodes of kinds and numbers seen before needs no search."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from orchestrator.planner.calibration import Calibration
from orchestrator.planner.choose import Search
from orchestrator.planner.frontier import Ranking, Wish
from orchestrator.planner.pool import Signature

KEPT = 64
"""Rankings that are kept; the one used longest ago goes first."""


@dataclass(slots=True)
class Ready:
    """Rankings of one job by what its nodes are, whichever they are. Safe to use from several threads."""

    _rankings: OrderedDict[tuple[Signature, ...], Ranking] = field(default_factory=OrderedDict)
    _calibration: Calibration | None = None

    def __len__(self) -> int:
        return len(self._rankings)

    def find(self, search: Search) -> Ranking | None:
        """The ranking of a search on the same kinds of nodes; None when there was none since the last calibration."""
        if search.calibration != self._calibration:
            self._rankings, self._calibration = OrderedDict(), search.calibration
        return self._rankings.get(_key(search))

    def keep(self, search: Search, ranking: Ranking) -> None:
        """Remember the ranking of a search."""
        if search.calibration == self._calibration:
            self._rankings[_key(search)] = ranking
            while len(self._rankings) > KEPT:
                self._rankings.popitem(last=False)

    def ranked(self, search: Search) -> Ranking:
        """What `search.ranked` finds for any plan, from memory where it can."""
        found = self.find(search)
        if found is None:
            found = search.ranked(Wish())
            self.keep(search, found)
        return found


def _key(search: Search) -> tuple[Signature, ...]:
    return tuple(space.pool.signature for space in search.spaces)
