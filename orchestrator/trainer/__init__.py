"""What a training script imports: the session, its channel to the agent, state and sampling.

`Session` is imported on first use, so that the parts without torch (`sampler`, `channel`) stay cheap to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.trainer.batch import Batch, MicroBatch
    from orchestrator.trainer.session import Session

__all__ = ["Batch", "MicroBatch", "Session"]


def __getattr__(name: str) -> Any:
    if name == "Session":
        from orchestrator.trainer.session import Session

        return Session
    if name in ("Batch", "MicroBatch"):
        from orchestrator.trainer import batch

        return getattr(batch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
