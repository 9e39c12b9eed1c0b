"""Any format to any format, through the universal view."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.language import Rules
from orchestrator.checkpoint.stream import Limits, Progress
from orchestrator.checkpoint.verify import check_bytes, prove
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import Conflict, InvalidInput

TARGETS = ("universal", "native", "dcp", "deepspeed-universal", "huggingface")
"""What can be written."""

Begun = Callable[[str, int], Progress]
"""Told of a stage in words and its bytes; returns what is told of bytes done."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to write, and how."""

    to: str = "universal"
    """One of `TARGETS`."""
    ranks: int = 1
    """`native`: parts to divide it into."""
    stage: int = 1
    """`deepspeed-universal`: the ZeRO stage that will load it."""
    dtype: str | None = None
    """`huggingface`: dtype of the weights; None = the one they are trained with."""
    check: bool = True
    """Compare the source with its checksums before anything is written."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion has done."""

    source: str
    """Format of the source, in words."""
    tensors: int
    bytes: int
    """Of the logical tensors written."""
    seconds: float
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    target: Path,
    conversion: Conversion,
    *,
    source_format: str | None = None,
    tag: str | None = None,
    rules: Rules | None = None,
    begun: Begun = lambda words, total_bytes: _silent,
) -> Converted:
    """Write the checkpoint at `source` to the new folder `target`.

    `begun` is told of each stage with the bytes that it will read and returns what is told of its progress. Raises
    `InvalidInput` for wrong arguments, `Conflict` when the target exists, `CheckpointError` and `CorruptCheckpoint` for
    a source that cannot be read and a target that cannot be written; the target then does not exist.
    """
    started = time.perf_counter()
    if conversion.to not in TARGETS:
        raise InvalidInput(f"{conversion.to!r} is not a format to write: choose one of {', '.join(TARGETS)}")
    if target.exists() and conversion.to != "native":
        raise Conflict(f"{target} exists already: give a folder that does not exist, or remove it")
    view = open_checkpoint(source, source=source_format, tag=tag, rules=rules)
    prove(view)
    size_bytes = sum(one.size_bytes for one in view.tensors.values())
    if conversion.check:
        check_bytes(view, threads=conversion.limits.threads, progress=begun(f"checking {view.source}", size_bytes))
    notes = _write(view, target, conversion, begun(f"converting to {conversion.to}", size_bytes))
    seconds = time.perf_counter() - started
    return Converted(view.source, len(view.tensors), size_bytes, seconds, (*view.notes, *notes))


def _write(view: UniversalView, target: Path, conversion: Conversion, progress: Progress) -> tuple[str, ...]:
    """Write it; returns what the target could not take as it is, in whole sentences."""
    limits = conversion.limits
    if conversion.to == "universal":
        from orchestrator.checkpoint.formats.universal import write_universal

        write_universal(view, target, limits=limits, progress=progress)
    elif conversion.to == "huggingface":
        from orchestrator.checkpoint.formats.huggingface import write_huggingface

        write_huggingface(view, target, limits=limits, progress=progress, dtype=conversion.dtype)
    elif conversion.to == "native":
        from orchestrator.checkpoint.formats.native_target import write_native

        write_native(view, target, ranks=conversion.ranks, limits=limits, progress=progress)
    elif conversion.to == "dcp":
        from orchestrator.checkpoint.formats.dcp_target import write_dcp

        write_dcp(view, target, limits=limits, progress=progress)
    else:
        from orchestrator.checkpoint.formats.deepspeed_universal_target import write_deepspeed_universal

        return write_deepspeed_universal(view, target, stage=conversion.stage, limits=limits, progress=progress)
    return ()


def _silent(count: int) -> None:
    """Nobody looks at the progress."""
