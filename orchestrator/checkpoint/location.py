"""From what a user types to the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.checkpoint.files import Files, LocalFiles
from orchestrator.checkpoint.objects import SCHEMES, objects_at
from orchestrator.checkpoint.root import parse_root
from orchestrator.core.errors import CheckpointError


def files_at(location: str | Path) -> Files:
    """The files at a path or URI; a path to one file stands for that file alone.

    Raises `InvalidInput` for a location that is none, `CheckpointError` when nothing is there or it cannot be read.
    """
    if isinstance(location, str) and "://" in location and urlsplit(location).scheme in SCHEMES:
        return objects_at(location)
    path = parse_root(location)
    path = path.resolve() if path.name in ("", "..") else path  # a folder's name says what it holds
    try:
        if path.is_dir():
            return LocalFiles(path)
        if path.is_file():
            return LocalFiles(path.parent, only=path.name)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    raise CheckpointError(f"{path} does not exist: give the folder or file of a checkpoint")
