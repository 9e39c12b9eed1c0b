"""Verdict: is this node fit to train? A pure function of the signals, which always says why."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.spec import RecoverySpec
from orchestrator.core.status import Health, Verdict

SILENT_HEARTBEATS = 3
"""Heartbeats missed in a row that make a node SUSPECT."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What speaks for and against one node."""

    connected: bool | None
    """None = not yet heard of since the controller started."""
    silence_s: float
    """Seconds since its last heartbeat (or since the controller started)."""
    peers_failed: bool
    """Other nodes of its live generation report failed workers: something in that generation broke."""
    starting: bool = False
    """Its generation has not completed a step: little is lost by giving the node up early."""
    lost_reason: str | None = None
    """Why it was given up earlier; None = it was not, or has registered again since."""


def verdict(signals: Signals, recovery: RecoverySpec) -> Verdict:
    """LOST by the lease, or earlier when a closed connection (or silence) and failed peers tell the same story."""
    if signals.lost_reason is not None:
        return Verdict(Health.LOST, signals.lost_reason)
    silence_s = signals.silence_s
    if silence_s >= recovery.lost_after_s:
        return Verdict(Health.LOST, f"no heartbeat for {silence_s:.1f} s (lostAfter {recovery.lost_after_s:g} s)")
    if signals.peers_failed and signals.connected is False:
        return Verdict(Health.LOST, "its connection closed and its generation's workers failed elsewhere")
    if signals.peers_failed and silence_s >= early_loss_s(recovery):
        return Verdict(Health.LOST, f"no heartbeat for {silence_s:.1f} s and its generation's workers failed elsewhere")
    if signals.starting and signals.connected is False and silence_s >= early_loss_s(recovery):
        return Verdict(Health.LOST, f"its connection closed while its generation was starting, {silence_s:.1f} s ago")
    if signals.connected is False:
        return Verdict(Health.SUSPECT, f"its connection closed {silence_s:.1f} s after its last heartbeat")
    if silence_s >= SILENT_HEARTBEATS * recovery.heartbeat_s:
        return Verdict(Health.SUSPECT, f"no heartbeat for {silence_s:.1f} s")
    return Verdict(Health.HEALTHY, "heartbeats arrive")


def early_loss_s(recovery: RecoverySpec) -> float:
    """Silence that counts as loss once peers have failed: a third of the lease, and never under three heartbeats."""
    return max(SILENT_HEARTBEATS * recovery.heartbeat_s, recovery.lost_after_s / 3)
