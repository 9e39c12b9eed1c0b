"""PyTorch Distributed Checkpoint: what `torch.distributed.checkpoint.save` wrote from any mesh. Read without torch."""

from __future__ import annotations

import re

from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats import Reading
from orchestrator.checkpoint.formats.dcp_metadata import HUGGINGFACE_SHARD, metadata_files, read_inventory
from orchestrator.checkpoint.formats.dcp_naming import Naming
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

NAME = "PyTorch distributed checkpoint"
_NUMBER = re.compile(r"(\d+)\D*$")


def recognise(files: Files) -> bool:
    """Whether the files are a distributed checkpoint, or folders of them."""
    return bool(_folders(files))


def open_files(files: Files, reading: Reading) -> UniversalView:
    """The view; of several folders the newest by the number in its name, or the one that `reading.tag` names."""
    folder = _choose(files, _folders(files), reading.tag)
    inventory = read_inventory(files, folder)
    return Naming(files, inventory).view()


def _folders(files: Files) -> list[str]:
    """Folders (empty, or one name with `/`) that hold a distributed checkpoint."""
    within: dict[str, list[str]] = {}
    for name in files.names():
        folder, slash, rest = name.rpartition("/")
        if "/" not in folder:
            within.setdefault(folder + slash, []).append(rest)
    found = [
        folder
        for folder, names in within.items()
        if metadata_files(names) or any(HUGGINGFACE_SHARD.fullmatch(name) for name in names)
    ]
    return [""] if "" in found else sorted(found)


def _choose(files: Files, folders: list[str], tag: str | None) -> str:
    if tag is not None:
        chosen = [folder for folder in folders if folder.rstrip("/") == tag or (_last_number(folder) == _number(tag))]
        if len(chosen) == 1 or tag + "/" in chosen:
            return tag + "/" if tag + "/" in chosen else chosen[0]
        if folders != [""]:
            raise CheckpointError(f"{files.location} holds no checkpoint {tag}: choose one of {_list(folders)}")
    if len(folders) == 1:
        return folders[0]
    if not folders:
        raise CheckpointError(f"{files.location} holds no .metadata: give the folder of a distributed checkpoint")
    numbers = {folder: _last_number(folder) for folder in folders}
    newest = max(folders, key=lambda folder: numbers[folder] or 0)
    if None in numbers.values() or list(numbers.values()).count(numbers[newest]) > 1:
        raise CheckpointError(f"{files.location} holds several checkpoints: name one as the tag, {_list(folders)}")
    return newest


def _last_number(folder: str) -> int | None:
    match = _NUMBER.search(folder)
    return int(match[1][:18]) if match else None


def _number(tag: str) -> int:
    return int(tag) if re.fullmatch(r"\d{1,18}", tag) else -1


def _list(folders: list[str]) -> str:
    return ", ".join(folder.rstrip("/") for folder in folders[:10])
