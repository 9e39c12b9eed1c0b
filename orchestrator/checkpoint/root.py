"""Where checkpoints are: the root directory, from a URI to a path that is known to be usable."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.checkpoint.manifest import parse_directory_name
from orchestrator.core.errors import CheckpointError, InvalidInput


def parse_root(uri: str | Path) -> Path:
    """The directory that `file:///path` or a plain path names; raises `InvalidInput` for anything else."""
    if isinstance(uri, Path):
        return uri
    if "\0" in uri or not uri.strip():
        raise InvalidInput(f"checkpoint location {uri!r} is not a path: give a directory or file:///directory")
    if "://" not in uri and not uri.startswith("file:"):
        return Path(uri)
    parts = urlsplit(uri)
    if parts.scheme != "file":
        raise InvalidInput(
            f"checkpoint location {uri!r} has the scheme {parts.scheme!r}, which is not supported: "
            "give a directory or file:///directory"
        )
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InvalidInput(f"checkpoint location {uri!r} is not an absolute path of this host: give file:///directory")
    return Path(unquote(parts.path))


def create_root(uri: str | Path) -> Path:
    """The root, made where only its last component is missing; raises `CheckpointError` when it cannot be written."""
    root = parse_root(uri)
    try:
        root.mkdir(exist_ok=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint directory {root} cannot be made because {root.parent} does not exist: create that first"
        ) from error
    except FileExistsError as error:
        raise CheckpointError(f"checkpoint location {root} is a file: give a directory") from error
    except OSError as error:
        raise CheckpointError(
            f"checkpoint directory {root} cannot be made ({error.strerror}): give one that can be written"
        ) from error
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise CheckpointError(f"checkpoint directory {root} cannot be read and written: give one that can")
    return root


def list_root(uri: str | Path) -> list[tuple[int, int, str]]:
    """(step, generation, name) of all checkpoint directories, committed or not; none where the root is yet to be made.

    Raises `CheckpointError` when the root cannot be read, or its parent does not exist.
    """
    root = parse_root(uri)
    try:
        names = [entry.name for entry in root.iterdir()]
    except FileNotFoundError as error:
        if root.parent.is_dir():
            return []
        raise CheckpointError(
            f"checkpoint directory {root} does not exist, nor does {root.parent}: give one that does"
        ) from error
    except NotADirectoryError as error:
        raise CheckpointError(f"checkpoint location {root} is not a directory: give one") from error
    except OSError as error:
        raise CheckpointError(
            f"checkpoint directory {root} cannot be read ({error.strerror}): give one that can"
        ) from error
    parsed = [(parse_directory_name(name), name) for name in names]
    return [(*found, name) for found, name in parsed if found is not None]


def checkpoint_directory(root: Path, path: str) -> Path:
    """The directory of the checkpoint `path` under `root`; raises `InvalidInput` for a name that is none."""
    if parse_directory_name(path) is None:
        raise InvalidInput(f"{path!r} is not the name of a checkpoint: give one like step-00000040-gen-0003")
    return root / path


def require_space(root: Path, needed_bytes: int) -> None:
    """Raises `CheckpointError` when the file system of `root` has fewer free bytes than `needed_bytes`."""
    usage = os.statvfs(root)
    free_bytes = usage.f_bavail * usage.f_frsize
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"checkpoint directory {root} has {free_bytes} bytes free but {needed_bytes} are needed: "
            "make room or keep fewer checkpoints"
        )
