"""What a native checkpoint consists of: the part manifest of each rank and the manifest that commits them. <-> JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash

from orchestrator.checkpoint.fields import Fields, corrupt, parse_object
from orchestrator.checkpoint.part_tensors import MEMBERS, PartTensor, PartTensors, part_data, part_tensors

PART_FORMAT = "regrow-part"
MANIFEST_FORMAT = "regrow-checkpoint"
PART_VERSION = 2
"""Of part manifests: 1 had an object per chunk, which cost twenty times as long to read."""
VERSION = 1
"""Of the commit manifest."""
MANIFEST = "manifest.json"
"""Name of the file that commits a checkpoint."""
MAX_MANIFEST_BYTES = 1 << 29
"""A larger manifest is not read: it is not ours."""

_DIRECTORY = re.compile(r"step-(\d{8,18})-gen-(\d{4,18})")


def directory_name(step: int, generation: int) -> str:
    """`step-00000040-gen-0003`."""
    return f"step-{step:08d}-gen-{generation:04d}"


def parse_directory_name(name: str) -> tuple[int, int] | None:
    """(step, generation) of a checkpoint's directory name; None for any other name."""
    match = _DIRECTORY.fullmatch(name)
    if match is None:
        return None
    step, generation = int(match[1]), int(match[2])
    return (step, generation) if directory_name(step, generation) == name else None


def data_name(rank: int) -> str:
    """`part-00002.safetensors`: the chunks of a rank."""
    return f"part-{rank:05d}.safetensors"


def part_name(rank: int) -> str:
    """`part-00002.json`: the part manifest of a rank."""
    return f"part-{rank:05d}.json"


def digest_of(data: bytes | memoryview) -> str:
    """xxh3-128 (hex)."""
    return xxhash.xxh3_128_hexdigest(data)


Tensors_co = TypeVar("Tensors_co", bound=Sequence[PartTensor], covariant=True)
"""How a part's tensors are kept."""


@dataclass(frozen=True, slots=True)
class PartManifest(Generic[Tensors_co]):
    """What one rank has written; `PartManifest[PartTensors]` is one that was read.

    Invariant: the header and the chunks tile the data file, so that every byte of it is under a checksum.
    """

    generation: int
    step: int
    rank: int
    world_size: int
    file_bytes: int
    header_bytes: int
    header_digest: str
    tensors: Tensors_co
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PartEntry:
    """A part as the commit manifest knows it: the digest of its part manifest, and its size with that manifest."""

    rank: int
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The commit: which parts make the checkpoint. Invariant: one part per rank, in rank order."""

    generation: int
    step: int
    seconds: float
    """From the beginning of the slowest rank's writing to the commit, without the time between them."""
    parts: tuple[PartEntry, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.size_bytes for part in self.parts)


# ---------------------------------------------------------------- part manifest


def encode_part(part: PartManifest[Sequence[PartTensor]]) -> bytes:
    """The part manifest as JSON; raises `TypeError` or `ValueError` when its state is not JSON-able."""
    return _dump(
        {
            "format": PART_FORMAT,
            "version": PART_VERSION,
            "generation": part.generation,
            "step": part.step,
            "rank": part.rank,
            "world_size": part.world_size,
            "file_bytes": part.file_bytes,
            "header_bytes": part.header_bytes,
            "header_digest": part.header_digest,
            **part_data(part.tensors),
            "state": part.state,
        }
    )


def decode_part(text: bytes, file: str) -> PartManifest[PartTensors]:
    """The part manifest in `text`, every range checked; raises `CorruptCheckpoint` naming `file` (and the tensor)."""
    fields = parse_object(text, file, MEMBERS)
    fields.expect("format", PART_FORMAT)
    fields.expect("version", PART_VERSION)
    part = PartManifest(
        generation=fields.integer("generation"),
        step=fields.integer("step"),
        rank=fields.integer("rank"),
        world_size=fields.integer("world_size"),
        file_bytes=fields.integer("file_bytes"),
        header_bytes=fields.integer("header_bytes"),
        header_digest=fields.digest("header_digest"),
        tensors=part_tensors(fields),
        state=fields.mapping("state"),
    )
    _check_groups(part.state, file)
    _check_tiling(part, file)
    return part


def _check_groups(state: dict[str, Any], file: str) -> None:
    groups = state.get("param_groups", [])
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise corrupt(file, "its state's param_groups is not a list of objects")
    for group in groups:
        names = group.get("params", [])
        if not isinstance(names, list) or not set(map(type, names)) <= {str}:
            raise corrupt(file, "its state's param_groups do not list parameter names")


def _check_tiling(part: PartManifest[PartTensors], file: str) -> None:
    tensors, position = part.tensors, part.header_bytes
    order = np.lexsort((tensors.end, tensors.begin))
    begins, ends = tensors.begin[order], tensors.end[order]
    expected = np.concatenate((np.array([position], np.int64), ends[:-1]))[: len(begins)]
    wrong = np.flatnonzero(begins != expected)
    if wrong.size:
        first = int(wrong[0])
        reason = f"its byte range {begins[first]}..{ends[first]} should begin at {expected[first]}"
        raise corrupt(file, reason, tensors.names[tensors.owner[order[first]]])
    position = int(ends[-1]) if len(ends) else position
    if position != part.file_bytes:
        raise corrupt(file, f"its chunks end at byte {position} of {part.file_bytes}")


# ---------------------------------------------------------------- commit manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """The commit manifest as JSON, with a checksum of its own."""
    body = {
        "format": MANIFEST_FORMAT,
        "version": VERSION,
        "generation": manifest.generation,
        "step": manifest.step,
        "seconds": manifest.seconds,
        "parts": [{"rank": part.rank, "digest": part.digest, "size_bytes": part.size_bytes} for part in manifest.parts],
    }
    return seal(body)


def decode_manifest(text: bytes, file: str) -> Manifest:
    """The commit manifest in `text`; raises `CorruptCheckpoint` naming `file`."""
    fields = parse_object(text, file)
    fields.expect("format", MANIFEST_FORMAT)
    fields.expect("version", VERSION)
    require_seal(fields, text)
    parts = tuple(
        PartEntry(one.integer("rank"), one.digest("digest"), one.integer("size_bytes"))
        for one in fields.objects("parts")
    )
    if not parts or [part.rank for part in parts] != list(range(len(parts))):
        raise fields.fail("its parts are not one per rank")
    return Manifest(fields.integer("generation"), fields.integer("step"), fields.number("seconds"), parts)


def seal(body: dict[str, Any]) -> bytes:
    """The object as JSON, with a checksum of itself."""
    return _dump(body | {"digest": digest_of(_dump(body))})


def require_seal(fields: Fields, text: bytes) -> None:
    """Raises `CorruptCheckpoint` unless `text`, which `fields` were read from, is what `seal` wrote."""
    digest = fields.digest("digest")
    if digest_of(_dump({key: value for key, value in fields.data.items() if key != "digest"})) != digest:
        raise fields.fail("its checksum does not match its contents")
    if _dump(fields.data) != text:  # another spelling of the same values, such as one more digit of a number
        raise fields.fail("it is not as it was written")


def _dump(data: dict[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


# ---------------------------------------------------------------- state


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The JSON state of a job from those of its ranks, in rank order.

    Parameter groups are merged by index: the hyper-parameters of the first rank that has the group, the parameter names
    of all. Everything else is the first rank's.
    """
    if not states:
        return {}
    groups: list[dict[str, Any]] = []
    names: list[dict[str, None]] = []  # dictionaries as ordered sets
    for state in states:
        for index, group in enumerate(state.get("param_groups", [])):
            if index == len(groups):
                groups.append(group)
                names.append({})
            names[index].update(dict.fromkeys(group.get("params", [])))
    merged = dict(states[0])
    if groups:
        merged["param_groups"] = [group | {"params": list(known)} for group, known in zip(groups, names, strict=True)]
    return merged
