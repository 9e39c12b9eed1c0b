"""Reading manifests from a checkpoint's folder, and the logical tensors that its parts make together.

The folder may be a directory or lie in an object store; its name is the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import TypeVar

import numpy as np

from orchestrator.checkpoint.columns import Boxes, BoxKey, ColumnChunks, Columns
from orchestrator.checkpoint.fields import corrupt, naming
from orchestrator.checkpoint.files import Files, folder_name, read_whole
from orchestrator.checkpoint.layout import LogicalTensor
from orchestrator.checkpoint.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    PartEntry,
    PartManifest,
    data_name,
    decode_manifest,
    decode_part,
    digest_of,
    parse_directory_name,
    part_name,
)
from orchestrator.checkpoint.part_tensors import Form, PartTensor, PartTensors
from orchestrator.checkpoint.rows import Column
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint

Key = TypeVar("Key")


def load_manifest(files: Files) -> Manifest:
    """The commit manifest in a checkpoint's folder; raises `CheckpointError` when it is not committed or damaged."""
    try:
        text = read_whole(files, MANIFEST, MAX_MANIFEST_BYTES)
    except CorruptCheckpoint as error:
        if not _is_missing(error):
            raise
        raise CheckpointError(f"there is no committed checkpoint at {files.location}: choose another one") from error
    manifest = decode_manifest(text, files.label(MANIFEST))
    if (manifest.step, manifest.generation) != parse_directory_name(folder_name(files)):
        raise corrupt(
            files.label(MANIFEST),
            f"it belongs to step {manifest.step} of generation {manifest.generation}, so it was moved here",
        )
    return manifest


def load_parts(files: Files, manifest: Manifest) -> Iterator[PartManifest[PartTensors]]:
    """All part manifests that a commit names, one after the other, each checked as `load_part` does."""
    step, generation, ranks = manifest.step, manifest.generation, len(manifest.parts)
    return (load_part(files, one, step=step, generation=generation, world_size=ranks) for one in manifest.parts)


def load_part(
    files: Files, entry: PartEntry, *, step: int, generation: int, world_size: int
) -> PartManifest[PartTensors]:
    """The part manifest that `entry` stands for, its digest, its place and its data file's size checked."""
    label = files.label(part_name(entry.rank))
    text = read_part(files, entry)
    part = decode_part(text, label)
    if (part.rank, part.step, part.generation, part.world_size) != (entry.rank, step, generation, world_size):
        raise corrupt(
            label,
            f"it belongs to rank {part.rank} of {part.world_size}, step {part.step}, generation {part.generation}",
        )
    if entry.size_bytes != part.file_bytes + len(text):
        raise corrupt(label, f"it describes {part.file_bytes} bytes, not the size that was reported for it")
    _require_size(files, part)
    return part


def read_part(files: Files, entry: PartEntry) -> bytes:
    """The bytes of the part manifest that `entry` stands for, its digest checked."""
    text = read_whole(files, part_name(entry.rank), MAX_MANIFEST_BYTES)
    if digest_of(text) != entry.digest:
        raise corrupt(files.label(part_name(entry.rank)), "its checksum is not the one that was reported for it")
    return text


def _require_size(files: Files, part: PartManifest[Sequence[PartTensor]]) -> None:
    """Raises `CorruptCheckpoint`, naming the first tensor concerned, unless the data file is as long as it was."""
    file = data_name(part.rank)
    try:
        size_bytes = files.size(file)
    except CorruptCheckpoint as error:
        if (first := _first_beyond(part, 0)) is None:
            raise
        raise naming(error, first) from error
    if size_bytes != part.file_bytes:
        reason = f"it has {size_bytes} bytes instead of {part.file_bytes}"
        raise corrupt(files.label(file), reason, _first_beyond(part, size_bytes))


def _first_beyond(part: PartManifest[Sequence[PartTensor]], size_bytes: int) -> str | None:
    """The tensor of the first chunk that does not fit into `size_bytes`."""
    beyond = [
        (chunk.begin, tensor.name) for tensor in part.tensors for chunk in tensor.chunks if chunk.end > size_bytes
    ]
    return min(beyond)[1] if beyond else None


def _is_missing(error: CorruptCheckpoint) -> bool:
    return isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)


def merge_parts(name: str, parts: Iterable[PartManifest[PartTensors]]) -> dict[str, LogicalTensor]:
    """The logical tensors of the checkpoint `name`; raises `CorruptCheckpoint` when parts disagree about one.

    Each part is let go once it is merged, where `parts` does so, too.
    """
    merging = _Merging(name)
    for part in parts:
        merging.add(part)
    return merging.tensors()


class _Merging:
    """The logical tensors while their parts are read; tensors, forms and boxes are numbered as they turn up."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tensors: dict[str, int] = {}
        self._firsts: list[tuple[str, int]] = []
        """Parameter of each tensor, and rank of the part that named it first."""
        self._form: list[int] = []
        """Number of each tensor's form."""
        self._forms: dict[Form, int] = {}
        self._boxes: dict[BoxKey, int] = {}
        self._files: list[str] = []
        self._columns: list[tuple[Column, Column, Column]] = []
        """Tensor, box and beginning of each part's chunks."""
        self._digests: list[bytes] = []

    def add(self, part: PartManifest[PartTensors]) -> None:
        """Take in one more part; raises `CorruptCheckpoint` when it disagrees with an earlier one."""
        held = part.tensors
        forms = _numbers(self._forms, held.forms)[held.form]
        tensors = self._numbers(part, forms)
        differing = np.flatnonzero(np.array(self._form, np.int64)[tensors] != forms)
        if differing.size:
            raise self._disagreement(part, tensors[differing[0]], forms[differing[0]])
        boxes = _numbers(self._boxes, held.boxes.keys())
        self._files.append(data_name(part.rank))
        self._columns.append((tensors[held.owner], boxes[held.box], held.begin))
        self._digests.append(held.digests)

    def _numbers(self, part: PartManifest[PartTensors], forms: Column) -> Column:
        """Of the part's tensors, new ones among them. Equal names of equal forms are of equal parameters, too."""
        held = part.tensors
        numbers = np.array(list(map(self._tensors.get, held.names, repeat(-1))), np.int64)
        for at in np.flatnonzero(numbers < 0).tolist():
            numbers[at] = self._tensors[held.names[at]] = len(self._firsts)
            self._firsts.append((held.parameters[held.parameter[at]], part.rank))
            self._form.append(int(forms[at]))
        return numbers

    def _disagreement(self, part: PartManifest[PartTensors], tensor: int, form: int) -> CorruptCheckpoint:
        forms = list(self._forms)
        known, first = f"{forms[self._form[tensor]]}", f"{self._name}/{part_name(self._firsts[tensor][1])}"
        reason = f"it is a {forms[form]} but a {known} in {first}"
        return corrupt(f"{self._name}/{part_name(part.rank)}", reason, list(self._tensors)[tensor])

    def tensors(self) -> dict[str, LogicalTensor]:
        """All of them, each with its chunks in the order of the parts."""
        (columns, edges), forms, found = self._ordered(), list(self._forms), {}
        for number, (name, (parameter, _)) in enumerate(zip(self._tensors, self._firsts, strict=True)):
            state, kind, dtype, shape = forms[self._form[number]]
            first, last = edges[number : number + 2]
            chunks = ColumnChunks(columns, len(shape), first, last)
            found[name] = LogicalTensor(name, parameter, state, kind, dtype, shape, chunks)
        return found

    def _ordered(self) -> tuple[Columns, list[int]]:
        """All chunks, tensor by tensor, and where each tensor's begin; the last of these is where all end."""
        nothing = np.zeros(0, np.int64)
        tensor, box, begin = map(np.concatenate, zip((nothing,) * 3, *self._columns, strict=True))
        part = np.repeat(np.arange(len(self._files)), [len(one) for one, _, _ in self._columns])
        order = np.argsort(_narrow(tensor), kind="stable")
        ends: list[int] = np.cumsum(np.bincount(tensor, minlength=len(self._form))).tolist()
        boxes, digests = Boxes.of(self._boxes), b"".join(self._digests)
        box, part, begin = (_narrow(column[order]) for column in (box, part, begin))
        return Columns(boxes, box, part, begin, _narrow(order), self._files, digests), [0, *ends]


def _numbers(known: dict[Key, int], keys: Iterable[Key]) -> Column:
    """The numbers of the keys, those of new ones following on."""
    return np.array([known.setdefault(key, len(known)) for key in keys], np.int64)


def _narrow(numbers: Column) -> Column:
    """The same numbers in the fewest bytes: a view of a million chunks is held by every process of a job."""
    return numbers.astype(np.min_scalar_type(numbers.max(initial=0)))
