"""Megatron-LM, in both its formats; read without torch or Megatron.

`torch`: `iter_0000100/mp_rank_00_001/model_optim_rng.pt`, one file per tensor- and pipeline-parallel rank.
`torch_dist`: `iter_0000100/common.pt` beside a distributed checkpoint of PyTorch.
"""

from __future__ import annotations

import re

from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import Files, read_whole
from orchestrator.checkpoint.formats import Reading
from orchestrator.checkpoint.formats.dcp_metadata import METADATA
from orchestrator.checkpoint.formats.megatron_dist import Distributed
from orchestrator.checkpoint.formats.megatron_merge import Whole
from orchestrator.checkpoint.formats.megatron_ranks import read_ranks
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

NAME = "Megatron-LM checkpoint"
TRACKER = "latest_checkpointed_iteration.txt"
_RANK_FILE = re.compile(r"((?:.*/)?)mp_rank_\d{2,}(?:_\d{3,}){0,2}/model_optim_rng\.pt")
_COMMON_FILE = re.compile(r"((?:.*/)?)common\.pt")
_DESCRIPTION_FILE = re.compile(r"((?:.*/)?)metadata\.json")
_ITERATION = re.compile(r"iter_(\d{1,18})")


def recognise(files: Files) -> bool:
    """Whether the files are a checkpoint of Megatron-LM, or the folder that it saves into."""
    return bool(_folders(files))


def open_files(files: Files, reading: Reading) -> UniversalView:
    """The view of the iteration that `reading.tag` gives (`100`, `iter_0000100` or `release`), else of the last one."""
    folder = _chosen(files, reading.tag)
    if folder + METADATA in files.names():
        return Distributed(files, folder, reading.rules).view()
    return Whole(files, read_ranks(files, folder), reading.rules).view()


def _folders(files: Files) -> set[str]:
    """Folders (empty, or with a `/` at the end) that hold files of ranks, or a distributed checkpoint."""
    names = files.names()
    ranks = {match[1] for name in names if (match := _RANK_FILE.fullmatch(name))}
    common = {match[1] for name in names if (match := _COMMON_FILE.fullmatch(name))}
    # What `common.pt` says is missed when it is read: without it the folder is Megatron's by the file beside it.
    common |= {match[1] for name in names if (match := _DESCRIPTION_FILE.fullmatch(name)) and _is_ours(files, name)}
    if TRACKER in names:  # which no plain DCP checkpoint has beside it
        folders = {name[: -len(METADATA)] for name in names if name.endswith(f"/{METADATA}")}
        common |= {folder for folder in folders if _iteration(folder) is not None}
    return ranks | {folder for folder in common if folder + METADATA in names}


def _is_ours(files: Files, name: str) -> bool:
    return files.size(name) < 4096 and b"sharded_backend" in read_whole(files, name)


def _chosen(files: Files, tag: str | None) -> str:
    folders = _folders(files)
    if not folders:
        raise CheckpointError(
            f"{files.location} holds no mp_rank folder or common.pt: give the folder of a Megatron-LM checkpoint"
        )
    if tag is None and TRACKER in files.names():
        tag = _tracked(files)
        if not any(_is(folder, tag) for folder in folders):
            raise corrupt(files.label(TRACKER), f"it names {tag}, which is not there")
    if tag is not None:
        found = [folder for folder in folders if _is(folder, tag)]
        if len(found) != 1:
            raise CheckpointError(f"{files.location} holds no checkpoint {tag}: choose one of {_list(folders)}")
        return found[0]
    if len(folders) == 1:
        return next(iter(folders))
    numbers = {folder: number for folder in folders if (number := _iteration(folder)) is not None}
    if len(numbers) != len(folders) or len(set(numbers.values())) != len(numbers):
        raise CheckpointError(f"{files.location} holds several checkpoints: name one as the tag, {_list(folders)}")
    return max(numbers, key=lambda folder: numbers[folder])


def _tracked(files: Files) -> str:
    text = read_whole(files, TRACKER, 100).strip()
    if text != b"release" and not re.fullmatch(rb"\d{1,18}", text):
        raise corrupt(files.label(TRACKER), "it holds neither an iteration nor release")
    return text.decode()


def _iteration(folder: str) -> int | None:
    match = _ITERATION.fullmatch(folder.rstrip("/").rpartition("/")[2])
    return int(match[1]) if match else None


def _is(folder: str, tag: str) -> bool:
    """Whether the folder is the checkpoint that a user or the tracker names so."""
    if re.fullmatch(r"\d{1,18}", tag):
        return _iteration(folder) == int(tag)
    return folder.rstrip("/").rpartition("/")[2] == tag


def _list(folders: set[str]) -> str:
    return ", ".join(sorted(folder.rstrip("/") for folder in folders)[:10])
