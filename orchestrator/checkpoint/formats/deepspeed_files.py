"""Which files a DeepSpeed checkpoint consists of: tags, file names, and what a rank in a name means."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TypeVar

from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import Files, read_whole
from orchestrator.checkpoint.formats import Reading
from orchestrator.core.errors import CheckpointError

LATEST = "latest"
"""File in the root that holds the tag of the newest checkpoint."""
MAX_TAG_BYTES = 4096

_Key = TypeVar("_Key")

_MODEL = re.compile(r"mp_rank_(\d{1,9})_model_states\.pt")
_ZERO_MODEL = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,9})_mp_rank_(\d{1,9})_model_states\.pt")
_OPTIMIZER = re.compile(r"(bf16_|fp16_)?zero_pp_rank_(\d{1,9})_mp_rank_(\d{1,9})_?optim_states\.pt")
_LAYER = re.compile(r"layer_(\d{1,9})(?:-[a-z]+_(\d{1,9}))?-model_states\.pt")
_EXPERT = re.compile(r"(?:layer_(-?\d{1,9})_)?expert_(\d{1,9})_mp_rank_(\d{1,9})_model_states\.pt")
_EXPERT_OPTIMIZER = re.compile(r"expp_rank_(\d{1,9})_mp_rank_(\d{1,9})_?optim_states\.pt")


@dataclass(slots=True)
class Found:
    """The files of one checkpoint by the ranks in their names. `pp_rank` in a name is the data-parallel rank."""

    folder: str
    """Prefix of its files: empty, or ending in `/`."""
    models: dict[int, str] = field(default_factory=dict)
    """Model-parallel rank -> model states (stages 0 to 2)."""
    zero_models: dict[tuple[int, int], str] = field(default_factory=dict)
    """(model-parallel rank, data-parallel rank) -> model states (stage 3)."""
    optimizers: dict[tuple[int, int], str] = field(default_factory=dict)
    """(model-parallel rank, data-parallel rank) -> optimizer states."""
    layers: dict[tuple[int, int], str] = field(default_factory=dict)
    """(layer, tensor-parallel rank) -> weights of one layer of a pipeline."""
    experts: dict[tuple[int, int, int], str] = field(default_factory=dict)
    """(model-parallel rank, layer with experts, expert) -> weights of one expert."""
    expert_optimizers: dict[tuple[int, int], str] = field(default_factory=dict)
    """(model-parallel rank, rank among the owners of experts) -> its optimizer (no ZeRO)."""

    @property
    def any(self) -> bool:
        """Whether there is a file that only a DeepSpeed checkpoint has."""
        return bool(self.models or self.zero_models or self.optimizers)


def checkpoints(files: Files) -> dict[str, Found]:
    """All folders below that hold files of a DeepSpeed checkpoint, by the folder's name (empty = the place itself)."""
    folders: dict[str, Found] = {}
    universal: set[str] = set()
    for name in sorted(files.names()):
        folder, _, base = name.rpartition("/")
        if base == "fp32.pt":
            universal.add(_above_zero(folder))
        if not base.endswith(".pt"):
            continue
        found = folders.get(folder)
        if found is None:
            found = folders[folder] = Found(f"{folder}/" if folder else "")
        _sort(files, found, base)
    return {folder: found for folder, found in folders.items() if found.any and folder not in universal}


def _above_zero(folder: str) -> str:
    """`tag` of `tag/zero/<parameter>`: a universal checkpoint, which holds copies of the model files."""
    parts = folder.split("/")
    return "/".join(parts[: parts.index("zero")]) if "zero" in parts else "/"


def _sort(files: Files, found: Found, base: str) -> None:
    file = found.folder + base
    if match := _MODEL.fullmatch(base):
        _put(files, found.models, int(match[1]), file)
    elif match := _ZERO_MODEL.fullmatch(base):
        _put(files, found.zero_models, (int(match[2]), int(match[1])), file)
    elif match := _OPTIMIZER.fullmatch(base):
        _put(files, found.optimizers, (int(match[3]), int(match[2])), file)
    elif match := _LAYER.fullmatch(base):
        _put(files, found.layers, (int(match[1]), int(match[2] or 0)), file)
    elif match := _EXPERT.fullmatch(base):
        _put(files, found.experts, (int(match[3]), int(match[1] or -1), int(match[2])), file)
    elif match := _EXPERT_OPTIMIZER.fullmatch(base):
        _put(files, found.expert_optimizers, (int(match[2]), int(match[1])), file)


def _put(files: Files, place: dict[_Key, str], key: _Key, file: str) -> None:
    other = place.setdefault(key, file)
    if other != file:
        raise corrupt(
            files.label(file), f"{files.label(other)} is of the same rank: remove the one of another, older save"
        )


def chosen(files: Files, reading: Reading) -> tuple[str, Found]:
    """The tag to read and its files.

    `reading.tag`, else what the file `latest` says, else the only one there is. Raises `CheckpointError`.
    """
    places = checkpoints(files)
    if "" in places:  # the folder of one checkpoint itself
        tag = PurePosixPath(files.location).name
        if reading.tag not in (None, tag):
            raise CheckpointError(
                f"{files.location} is the folder of checkpoint {tag}, not of {reading.tag}: give the folder above it"
            )
        return tag, places[""]
    wanted = reading.tag if reading.tag is not None else _latest(files)
    if wanted is None:
        if len(places) != 1:
            raise CheckpointError(
                f"{files.location} has no file {LATEST} that says which checkpoint is the newest: "
                f"choose a tag of {_listed(places)}"
            )
        wanted = next(iter(places))
    if wanted not in places:
        raise CheckpointError(
            f"{files.location} holds no DeepSpeed checkpoint {wanted}: choose a tag of {_listed(places)}"
        )
    return wanted, places[wanted]


def _latest(files: Files) -> str | None:
    if LATEST not in files.names():
        return None
    try:
        return read_whole(files, LATEST, MAX_TAG_BYTES).decode().strip()
    except UnicodeDecodeError as error:
        raise corrupt(files.label(LATEST), "it does not hold the name of a checkpoint") from error


def _listed(places: dict[str, Found]) -> str:
    tags = sorted(places)
    return ", ".join(tags[:10]) + (f" and {len(tags) - 10} more" if len(tags) > 10 else "") or "another place"
