"""What a job's own past says of its future: how long until it is interrupted again, how long until a node is back."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.core.capacity import held_s
from orchestrator.core.history import History

NODE_MTBF_S = 264 * 86400.0
"""A node of 8 GPUs before anything is known of this job: 419 unexpected interruptions of 2,048 nodes in 54 days are 3.8
per 1000 node-days (Llama 3, arXiv:2407.21783, section 3.3.4)."""
LONGEST_GUESS_S = 86400.0
"""Small jobs are interrupted by more than their nodes: no guess beyond a day."""
REMEMBERED = 20
"""Returns that are looked back at."""
PRIOR_EVENTS = 0.5
"""What the guess weighs, in interruptions: that of Jeffreys' prior for the rate of rare events."""


def mtbf_s(history: History, nodes: int, now_s: float) -> float:
    """Expected seconds until something interrupts a job on `nodes` nodes: what has been seen, and less and less the
    published rate (the mean of a gamma-distributed rate's inverse, taken as exposure / events).
    """
    guess_s = min(LONGEST_GUESS_S, NODE_MTBF_S / max(1, nodes))
    seen_s = max(0.0, now_s - history.accepted_s)
    return (PRIOR_EVENTS * guess_s + seen_s) / (PRIOR_EVENTS + len(history.failures))


def remaining_s(samples: Iterable[float], waited_s: float) -> float | None:
    """Expected seconds still to wait after `waited_s`, by how long it took other times.

    A time that has passed is expected to pass once more, but not twice. None when all have: nothing says then that the
    wait ends.
    """
    left = [sample - waited_s if sample > waited_s else sample for sample in samples if 2 * sample > waited_s]
    return sum(left) / len(left) if left else None


def return_s(history: History, nodes: Iterable[str], now_s: float) -> float | None:
    """Expected seconds until all of `nodes`, which are lost, are back and may be used; None when nothing says so."""
    waits = []
    for node in nodes:
        losses = history.losses.get(node, [now_s])
        wait_s = remaining_s(history.returns[-REMEMBERED:], now_s - losses[-1])
        if wait_s is None:
            return None
        waits.append(wait_s + held_s(losses, history.spec.recovery.settle_s, now_s))
    return max(waits, default=None)
