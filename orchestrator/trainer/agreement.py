"""How all ranks agree without waiting: one small asynchronous all-reduce per step.

Each step starts an all-reduce of a float64 vector on a gloo group of its own and waits for the one of the step before,
which has had a whole step to finish. Its sum holds the shares of the global mean loss, whether any rank was asked to
save or to pause, and whether any rank is still writing an earlier save. All ranks read the same sum after the same
step, so what they derive from it is agreed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks know about `step`."""

    step: int
    loss: float | None
    """Exact global mean loss; None unless every rank that owns a share of it gave one."""
    save: bool
    pause: bool
    writing: bool


class Agreement:
    """At most one all-reduce under way; `shares` ranks own a part of the loss."""

    def __init__(self, group: dist.ProcessGroup, shares: int) -> None:
        self._group = group
        self._shares = shares
        self._pending: tuple[int, torch.Tensor, dist.Work] | None = None

    def start(self, step: int, *, share: float | None, save: bool, pause: bool, writing: bool) -> None:
        """Contribute this rank's part for `step`; `share` is its share of the global mean loss."""
        assert self._pending is None, "the previous agreement must be finished first"
        vector = torch.tensor([share or 0.0, share is not None, save, pause, writing], dtype=torch.float64)
        work = dist.all_reduce(vector, group=self._group, async_op=True)
        self._pending = (step, vector, work)

    def finish(self) -> Agreed | None:
        """The sum of the last `start`, or None when there was none."""
        if self._pending is None:
            return None
        step, vector, work = self._pending
        self._pending = None
        work.wait()
        loss, shares, save, pause, writing = vector.tolist()
        return Agreed(step, loss if shares == self._shares else None, save > 0, pause > 0, writing > 0)
