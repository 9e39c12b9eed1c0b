"""The directory of a job's checkpoints: fencing, commit, listing and retention.

<root>/fence                                    the newest generation that has begun
<root>/lock                                     orders commits, fences and the renaming of parts
<root>/step-00000040-gen-0003/part-00002.*      what rank 2 wrote
<root>/step-00000040-gen-0003/manifest.json     the commit: without it the directory does not exist for readers
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.checkpoint.durable import locked, replace_durably, sync_directory
from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.layout import LogicalTensor
from orchestrator.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    PartEntry,
    directory_name,
    encode_manifest,
    part_name,
)
from orchestrator.checkpoint.parts import load_manifest, load_parts, merge_parts, read_part
from orchestrator.checkpoint.reshard import flaw_of
from orchestrator.checkpoint.root import create_root, list_root, parse_root
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint, InvalidInput, Refused

if TYPE_CHECKING:
    from orchestrator.core.types import SaveReport

FENCE = "fence"
"""Name of the file that holds the newest generation that has begun."""
_HIDDEN = ".removed-"
"""Prefix of directories that are being removed."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that readers may use. `path` is relative to the root; `seconds` as in `Manifest`."""

    step: int
    generation: int
    path: str
    size_bytes: int
    seconds: float


# ---------------------------------------------------------------- fencing


def fence(root: str | Path, generation: int) -> None:
    """From now on refuse commits and parts of generations older than `generation`, durably.

    Makes the root where it is missing. Raises `Refused` when a newer generation has begun already.
    """
    directory = create_root(root)
    with locked(directory):
        present = fenced(directory)
        if present > generation:
            raise Refused(
                f"generation {generation} is refused in {directory} because generation {present} has begun there: "
                "another controller uses it, give this job a directory of its own"
            )
        if present < generation:
            replace_durably(directory / FENCE, f"{generation}\n".encode())


def fenced(root: str | Path) -> int:
    """The generation that `fence` was last given; 0 when it never was."""
    path = parse_root(root) / FENCE
    try:
        text = path.read_text()
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint fence {path} cannot be read ({error}): make it readable") from error
    if not (text.strip().isascii() and text.strip().isdigit() and len(text) < 20):
        raise CorruptCheckpoint(
            f"checkpoint fence {path} does not hold a generation number: write the newest generation's into it"
        )
    return int(text)


def newest_generation(root: str | Path) -> int:
    """Highest generation that ever wrote here or was announced by `fence`; 0 when none. A new run must start above."""
    return max([fenced(root), *(generation for _, generation, _ in list_root(root))])


def require_fence(root: Path, generation: int) -> None:
    """Raises `Refused` when a generation newer than `generation` has begun."""
    newest = fenced(root)
    if generation < newest:
        raise Refused(
            f"generation {generation} may not write checkpoints in {root} any more because generation {newest} has "
            "begun: stop its workers"
        )


# ---------------------------------------------------------------- commit


def commit(root: str | Path, *, generation: int, step: int, world_size: int, parts: Sequence[SaveReport]) -> Committed:
    """Make the step visible to readers, in one atomic step; repeating a commit that succeeded changes nothing.

    Raises `CheckpointError` when a part is missing, is not what was reported, or the parts do not hold every element
    exactly once; `Refused` when a newer generation has begun or has committed.
    """
    began = time.perf_counter()
    base = parse_root(root)
    directory = base / directory_name(step, generation)
    entries = _entries(generation, step, world_size, parts)
    done = _already(directory, entries)
    if done is not None:
        return done
    if not directory.is_dir():
        raise CheckpointError(f"step {step} cannot be committed because {directory} does not exist: save it again")
    _check_parts(directory, step, generation, entries)
    with locked(base):
        done = _already(directory, entries)
        if done is not None:
            return done
        _require_newest(base, generation)
        files = LocalFiles(directory)  # a part may have been replaced since it was checked; from here on it cannot be
        for entry in entries:
            read_part(files, entry)
        seconds = max(part.write_s for part in parts) + time.perf_counter() - began
        manifest = Manifest(generation, step, seconds, entries)
        replace_durably(directory / MANIFEST, encode_manifest(manifest))
    return _committed(directory.name, manifest)


def _entries(generation: int, step: int, world_size: int, reports: Sequence[SaveReport]) -> tuple[PartEntry, ...]:
    ordered = sorted(reports, key=lambda report: report.rank)
    if world_size < 1 or [report.rank for report in ordered] != list(range(world_size)):
        raise CheckpointError(
            f"step {step} cannot be committed because {len(ordered)} parts are not one of each of {world_size} ranks: "
            "wait for the others"
        )
    for report in ordered:
        named = f"{directory_name(step, generation)}/{part_name(report.rank)}"
        if (report.generation, report.step, report.part) != (generation, step, named):
            raise CheckpointError(
                f"step {step} of generation {generation} cannot be committed with {report.part} of step {report.step} "
                f"of generation {report.generation}: each rank has to report {named}"
            )
    return tuple(PartEntry(report.rank, report.digest, report.size_bytes) for report in ordered)


def _already(directory: Path, entries: tuple[PartEntry, ...]) -> Committed | None:
    """The same commit, if it was made before; raises `Refused` when another was made under its name."""
    if not (directory / MANIFEST).exists():
        return None
    manifest = load_manifest(LocalFiles(directory))
    if manifest.parts != entries:
        raise Refused(f"checkpoint {directory} is committed already with other parts: save the step again")
    sync_directory(directory)  # a crash may have come between the rename and this
    return _committed(directory.name, manifest)


def _check_parts(directory: Path, step: int, generation: int, entries: tuple[PartEntry, ...]) -> None:
    parts = load_parts(LocalFiles(directory), Manifest(generation, step, 0.0, entries))
    check_coverage(directory.name, merge_parts(directory.name, parts).values())


def check_coverage(directory_name: str, tensors: Collection[LogicalTensor]) -> None:
    """Raises `CorruptCheckpoint` unless every element of every tensor is in exactly one chunk (or replicas of one)."""
    for tensor in tensors:
        reason = flaw_of(tensor.shape, tensor.chunks)
        if reason is not None:
            raise corrupt(f"{directory_name}/{MANIFEST}", reason, tensor.name)


def _require_newest(root: Path, generation: int) -> None:
    require_fence(root, generation)
    for _, other, name in list_root(root):
        if other > generation and (root / name / MANIFEST).exists():
            raise Refused(
                f"generation {generation} may not commit in {root} any more because the newer {name} is committed: "
                "stop its workers"
            )


# ---------------------------------------------------------------- listing


def committed(root: str | Path) -> list[Committed]:
    """All committed checkpoints, newest (highest step, then generation) first; [] where the root is yet to be made.

    One whose manifest is damaged is left out: no reader could use it. Raises `CheckpointError` when the root is
    unreadable.
    """
    base = parse_root(root)
    found = []
    for _, _, name in sorted(list_root(base), reverse=True):
        try:
            found.append(_committed(name, load_manifest(LocalFiles(base / name))))
        except CheckpointError:
            continue
    return found


def latest(root: str | Path) -> Committed | None:
    """The newest committed checkpoint; None when there is none."""
    return next(iter(committed(root)), None)


def _committed(name: str, manifest: Manifest) -> Committed:
    return Committed(manifest.step, manifest.generation, name, manifest.size_bytes, manifest.seconds)


# ---------------------------------------------------------------- retention


def prune(root: str | Path, keep_last: int, protect: Collection[int | str] = (), live_generation: int = 0) -> list[str]:
    """Remove all but the newest `keep_last` committed checkpoints and those in `protect` (steps or paths).

    Also removes what was never committed and never will be: directories of generations before `live_generation`, and
    those of the live generation before its newest committed step. Returns the names that were removed. A checkpoint
    disappears in one atomic step: a crash leaves it whole or, under a name that no reader looks at, for the next time.
    """
    if keep_last < 1:
        raise InvalidInput(f"{keep_last} checkpoints cannot be kept: keep at least 1")
    base = parse_root(root)
    present = list_root(base)
    if not present:
        return []
    kept = committed(base)
    old = [one.path for one in kept[keep_last:] if one.step not in protect and one.path not in protect]
    newest = max((one.step for one in kept if one.generation == live_generation), default=-1)
    garbage = [
        name
        for step, generation, name in sorted(present)
        if generation < live_generation or (generation == live_generation and step < newest)
    ]
    with locked(base):
        removed = [name for name in old if _hide(base, name)]
        removed += [name for name in garbage if not (base / name / MANIFEST).exists() and _hide(base, name)]
        sync_directory(base)
    for hidden in base.glob(f"{_HIDDEN}*"):
        shutil.rmtree(hidden, ignore_errors=True)
    return removed


def _hide(root: Path, name: str) -> bool:
    """Take a checkpoint's directory out of sight; False when it is gone already."""
    try:
        (root / name).rename(root / f"{_HIDDEN}{name}-{time.time_ns()}")
    except FileNotFoundError:
        return False
    return True
