"""Formats: one module for each layout that others write, and regrow's own. torch is imported here alone.

A module that reads has `NAME` (words for reports), `recognise(files) -> bool`, which looks at names and at most a few
bytes, and `open_files(files, reading) -> UniversalView`, which reads metadata only.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.heap import uncollected
from orchestrator.checkpoint.language import Rules
from orchestrator.checkpoint.location import files_at
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError, InvalidInput

SOURCES = ("native", "universal", "deepspeed_universal", "deepspeed", "megatron", "dcp", "huggingface")
"""Modules of this package that read a format, in the order in which they are asked."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read a source beyond what it says itself."""

    tag: str | None = None
    """Which of several checkpoints in one place (DeepSpeed's tag, a step); None = the newest, as the source says."""
    rules: Rules | None = None
    """How the pieces of model-parallel ranks make one tensor, where the source does not say."""


class Source(Protocol):
    """A module that reads a format."""

    NAME: str

    def recognise(self, files: Files) -> bool:
        """Whether the files look like this format, by their names and a few bytes."""

    def open_files(self, files: Files, reading: Reading) -> UniversalView:
        """The view; raises `CheckpointError` or `CorruptCheckpoint`."""


def open_checkpoint(
    location: str | Path, *, source: str | None = None, tag: str | None = None, rules: Rules | None = None
) -> UniversalView:
    """The universal view of whatever checkpoint lies at `location` (a path or URI).

    `source` names the format (one of `SOURCES`) where it is not to be recognised. Raises `InvalidInput` for an unknown
    one, `CheckpointError` when nothing is recognised or it cannot be read, `CorruptCheckpoint` when it is damaged.
    """
    if source is not None and source not in SOURCES:
        raise InvalidInput(f"{source!r} is not a checkpoint format: choose one of {', '.join(SOURCES)}")
    files = files_at(location)
    module = recognise(files) if source is None else _module(source)
    with uncollected():
        return module.open_files(files, Reading(tag, rules))


def recognise(files: Files) -> Source:
    """The format of the files; raises `CheckpointError` when it is none that is read."""
    if not files.names():
        raise CheckpointError(f"{files.location} is empty: give the folder of a checkpoint")
    for name in SOURCES:
        if importlib.util.find_spec(f"{__name__}.{name}") is None:
            continue
        module = _module(name)
        if module.recognise(files):
            return module
    raise CheckpointError(
        f"{files.location} holds no checkpoint of a known format: give the folder that holds its files, or name its "
        f"format ({', '.join(SOURCES)})"
    )


def _module(name: str) -> Source:
    module: Source = importlib.import_module(f"{__name__}.{name}")
    return module
