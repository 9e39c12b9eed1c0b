"""What a distributed checkpoint of PyTorch says about itself: keys, shapes, chunks, and where they lie. No torch.

Two layouts: `.metadata` (a pickle) beside `__<rank>_<n>.distcp` files of `torch.save` or safetensors blobs, and the
shards of `HuggingFaceStorageWriter`, safetensors files that tell in their headers which box of a tensor they hold.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from orchestrator.checkpoint.archive import TORCH_DTYPES, StoredTensor, read_safetensors
from orchestrator.checkpoint.fields import corrupt, naming
from orchestrator.checkpoint.files import Files, read_whole
from orchestrator.checkpoint.layout import ITEM_BYTES, MAX_DIMENSIONS, Box, Chunk
from orchestrator.checkpoint.reshard import flaw
from orchestrator.checkpoint.unpickle import Name, PickleError, Record, unpickle
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint

METADATA = ".metadata"
RANK_METADATA = re.compile(r"__(\d+)\.metadata")
"""Written by every rank for itself when a checkpoint is saved without collectives."""
HUGGINGFACE_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
MAX_DEPTH = 64
"""State dicts are not nested deeper."""
_SHARDING = "DCP_SHARDING_INFO"
_ZIP = b"PK\x03\x04"


class Blob(NamedTuple):
    """Bytes of a file."""

    file: str
    begin: int
    size: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor under its key in the state dict that was saved."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(slots=True)
class Inventory:
    """All entries of a checkpoint."""

    label: str
    """The file that errors name."""
    tensors: dict[str, Saved] = field(default_factory=dict)
    blobs: dict[str, Blob] = field(default_factory=dict)
    """Entries that are not tensors."""
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    """Key -> where its value was in the nested state dict, in the order of that dict; empty where not told."""
    original_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Megatron's shapes of tensors that are saved as a grid of flattened cells, one more dimension than they have."""
    notes: list[str] = field(default_factory=list)


def metadata_files(names: Iterable[str]) -> list[str]:
    """Those of the names (in one folder) that hold metadata: one for all ranks, or one of each rank."""
    names = set(names)
    if METADATA in names:
        return [METADATA]
    ranks = [(int(match[1]), name) for name in names if (match := RANK_METADATA.fullmatch(name))]
    return [name for _, name in sorted(ranks)]


def read_inventory(files: Files, folder: str) -> Inventory:
    """The entries of the checkpoint in `folder` (empty, or ending in `/`), checked: every element is held once."""
    within = [name[len(folder) :] for name in files.names() if name.startswith(folder)]
    described = metadata_files(within)
    if described:
        inventory = _from_pickles(files, folder, described)
    else:
        inventory = _from_shards(files, folder, sorted(name for name in within if HUGGINGFACE_SHARD.fullmatch(name)))
    for key, saved in inventory.tensors.items():
        reason = flaw(saved.shape, (chunk.box for chunk in saved.chunks))
        if reason is not None:
            raise corrupt(inventory.label, reason, key)
    return inventory


# ---------------------------------------------------------------- .metadata


def _from_pickles(files: Files, folder: str, described: list[str]) -> Inventory:
    inventory = Inventory(files.label(folder + described[0]))
    for name in described:
        _Pickled(files, folder, name, inventory).read()
    if described != [METADATA]:
        inventory.notes.append(
            f"It was saved without collectives: the metadata of {len(described)} ranks are read together, and values "
            "that are not tensors are those of the lowest rank."
        )
    return inventory


class _Pickled:
    """One metadata pickle, whose every field is checked before it is used."""

    def __init__(self, files: Files, folder: str, name: str, inventory: Inventory) -> None:
        self.files, self.folder, self.inventory = files, folder, inventory
        self.label = files.label(folder + name)
        self.metadata = self._attributes(_load(files, folder + name, self.label), "Metadata")
        self.blobs = _Blobs(files, self.label)

    def read(self) -> None:
        storage = self._storage()
        entries = self._mapping("state_dict_metadata")
        self.blobs.check(storage)
        for key, entry in entries.items():
            if isinstance(entry, Record) and entry.name.name == "BytesStorageMetadata":
                blob = storage.get((key, None))
                if blob is None:
                    raise corrupt(self.label, "no file holds it", key)
                self.inventory.blobs.setdefault(key, blob)
            else:
                self._add(key, self._tensor(key, entry, storage))
        self._read_original_shapes(entries)
        paths = self.metadata.get("planner_data")
        if isinstance(paths, dict):
            for key, path in paths.items():
                if key in entries and isinstance(path, tuple) and _is_path(path, key):
                    self.inventory.paths.setdefault(key, path)

    def _read_original_shapes(self, entries: dict[str, Any]) -> None:
        known = self.metadata.get("mcore_data")
        for key, data in known.items() if isinstance(known, dict) else ():
            shape = data.get("nd_reformulated_orig_global_shape") if isinstance(data, dict) else None
            if shape is not None and key in entries:
                if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
                    raise corrupt(self.label, "its original shape is not counts", key)
                self.inventory.original_shapes[key] = shape

    def _add(self, key: str, saved: Saved) -> None:
        earlier = self.inventory.tensors.get(key)
        if earlier is not None:
            if (earlier.dtype, earlier.shape) != (saved.dtype, saved.shape):
                raise corrupt(self.label, "ranks disagree about its dtype or shape", key)
            saved = Saved(saved.dtype, saved.shape, earlier.chunks + saved.chunks)
        self.inventory.tensors[key] = saved

    def _storage(self) -> dict[tuple[str, tuple[int, ...] | None], Blob]:
        """(key, offsets) -> bytes of the data files."""
        found: dict[tuple[str, tuple[int, ...] | None], Blob] = {}
        names = self.files.names()
        for index, info in self._mapping("storage_data", Record).items():
            where, place = self._attributes(index, "MetadataIndex"), self._attributes(info, "_StorageInfo")
            key, offsets = where.get("fqn"), where.get("offset")
            path, begin, count = place.get("relative_path"), place.get("offset"), place.get("length")
            if not isinstance(key, str) or not (offsets is None or _counts(offsets)):
                raise corrupt(self.label, "a key of its storage data is not a name with offsets")
            extent = (begin, count)
            if not isinstance(path, str) or not _counts(extent):
                raise corrupt(self.label, "its storage data name no bytes of a file", key)
            if place.get("transform_descriptors"):
                raise CheckpointError(
                    f"{self.label} says that {key} is stored through {_words(place['transform_descriptors'])}: load it "
                    "with torch.distributed.checkpoint and save it without extensions"
                )
            file = self.folder + path
            if file not in names:
                raise corrupt(self.label, f"it names the file {path[:200]!r}, which is not there", key)
            found[key, offsets] = Blob(file, *extent)
        return found

    def _tensor(self, key: str, entry: Any, storage: dict[tuple[str, tuple[int, ...] | None], Blob]) -> Saved:
        fields = self._attributes(entry, "TensorStorageMetadata", key)
        shape, listed = fields.get("size"), fields.get("chunks")
        if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not isinstance(listed, list):
            raise corrupt(self.label, "its shape or chunks are not counts", key)
        dtype = self._dtype(key, fields.get("properties"))
        chunks: dict[Box, Chunk] = {}
        for one in listed:
            part = self._attributes(one, "ChunkStorageMetadata", key)
            box = Box(part.get("offsets", ()), part.get("sizes", ()))
            if not _counts(box.offsets) or not _counts(box.sizes) or not box.inside(shape):
                raise corrupt(self.label, f"a chunk lies outside its shape {list(shape)}", key)
            blob = storage.get((key, box.offsets))
            if not box.elements or box in chunks:
                continue  # a rank without a share of the tensor
            if blob is None:
                raise corrupt(self.label, f"no file holds chunk {box}", key)
            chunks[box] = self.blobs.chunk(key, box, dtype, blob)
        return Saved(dtype, shape, tuple(chunks.values()))

    def _dtype(self, key: str, properties: Any) -> str:
        state = properties.state if isinstance(properties, Record) else None
        name = state[0] if isinstance(state, tuple) and state else None
        if not isinstance(name, Name):
            raise corrupt(self.label, "its dtype is not told", key)
        if name.module != "torch" or name.name not in TORCH_DTYPES:
            raise CheckpointError(f"{key} in {self.label} has the dtype {name}, which is not read: convert it first")
        return TORCH_DTYPES[name.name]

    def _mapping(self, key: str, keys: type = str) -> dict[Any, Any]:
        value = self.metadata.get(key)
        if not isinstance(value, dict) or not all(isinstance(one, keys) for one in value):
            raise corrupt(self.label, f"its {key} are not a mapping of {keys.__name__}s")
        return value

    def _attributes(self, value: Any, kind: str, key: str | None = None) -> dict[str, Any]:
        """The fields of a pickled dataclass."""
        known = isinstance(value, Record) and value.name.name in (kind, f"MCore{kind}")
        if not known or not isinstance(value.state, dict):
            raise corrupt(self.label, f"it holds a {_words(value)} where a {kind} is expected", key)
        return value.state


class _Blobs:
    """From the bytes that metadata name to chunks; a file holds `torch.save` archives or one safetensors blob."""

    def __init__(self, files: Files, label: str) -> None:
        self.files, self.label = files, label
        self.safetensors: dict[str, bool] = {}
        self.opened: dict[tuple[str, int], tuple[dict[str, StoredTensor], dict[str, Any]]] = {}

    def check(self, storage: dict[tuple[str, tuple[int, ...] | None], Blob]) -> None:
        """Entries lie within their files and share no byte: else a small checkpoint could stand for a huge one."""
        first: dict[str, Blob] = {}
        for (_, offsets), blob in storage.items():
            if offsets is not None:
                first.setdefault(blob.file, blob)
        for file, blob in first.items():
            self.safetensors[file] = not _begins(self.files, blob, _ZIP)
        sizes = {file: self.files.size(file) for file in {blob.file for blob in storage.values()}}
        ranges = []
        for (key, offsets), blob in storage.items():
            if blob.begin + blob.size > sizes[blob.file]:
                reason = f"{blob.size} bytes from byte {blob.begin} on are beyond its {sizes[blob.file]} bytes"
                raise corrupt(self.files.label(blob.file), reason, key)
            if offsets is None or not self.safetensors[blob.file]:
                ranges.append((*blob, key))
        ranges.sort()
        for (file, begin, count, _), (other, start, _, key) in itertools.pairwise(ranges):
            if file == other and start < begin + count:
                raise corrupt(self.label, f"its bytes in {file} are those of another entry, too", key)

    def chunk(self, key: str, box: Box, dtype: str, blob: Blob) -> Chunk:
        """The box's chunk in the file."""
        if self.safetensors[blob.file]:
            return self._safe(key, box, dtype, blob)
        if box.elements * ITEM_BYTES[dtype] > blob.size:
            raise corrupt(self.label, f"chunk {box} of {dtype} does not fit its {blob.size} bytes", key)
        return Chunk(box, blob.file, blob.begin, blob_bytes=blob.size)

    def _safe(self, key: str, box: Box, dtype: str, blob: Blob) -> Chunk:
        at = (blob.file, blob.begin)
        label = self.files.label(blob.file)
        if at not in self.opened:
            try:
                count = self.files.size(blob.file) - blob.begin
                tensors, metadata = read_safetensors(self.files, blob.file, blob.begin, count)
            except CorruptCheckpoint as error:
                raise naming(error, key) from error
            self.opened[at] = tensors, _sharding(metadata, label)
        tensors, boxes = self.opened[at]
        stored = tensors.get(key)
        if stored is None or _offsets(boxes, key, label) != box.offsets:
            raise corrupt(label, f"it does not hold chunk {box}", key)
        if stored.dtype != dtype or stored.shape != box.sizes:
            reason = f"it holds {stored.dtype} {list(stored.shape)} where {dtype} {list(box.sizes)} is expected"
            raise corrupt(label, reason, key)
        return Chunk(box, stored.file, stored.begin)


def _load(files: Files, file: str, label: str) -> Any:
    try:
        return unpickle(read_whole(files, file))
    except PickleError as error:
        raise corrupt(label, f"its pickle is not read ({error})") from error


def _begins(files: Files, blob: Blob, magic: bytes) -> bool:
    if blob.begin + len(magic) > files.size(blob.file):
        return False
    data = bytearray(len(magic))
    files.read_into(blob.file, blob.begin, memoryview(data))
    return data == magic


# ---------------------------------------------------------------- shards of the Hugging Face writer


def _from_shards(files: Files, folder: str, shards: list[str]) -> Inventory:
    inventory = Inventory(files.label(folder + shards[0]))
    pieces: dict[str, list[tuple[StoredTensor, tuple[int, ...]]]] = {}
    for key, stored, offsets in _shard_entries(files, folder, shards):
        pieces.setdefault(key, []).append((stored, offsets))
    for key, found in pieces.items():
        first = found[0][0]
        label = files.label(first.file)
        if any((one.dtype, len(one.shape)) != (first.dtype, len(first.shape)) for one, _ in found):
            raise corrupt(label, "shards disagree about its dtype or dimensions", key)
        ends = [[start + size for start, size in zip(at, one.shape, strict=True)] for one, at in found]
        shape = tuple(map(max, zip(*ends, strict=True)))
        if any(one >= 2**63 for one in shape):
            raise corrupt(label, "its offsets are too large", key)
        solid = [(one, at) for one, at in found if math.prod(one.shape)]
        chunks = tuple(Chunk(Box(at, one.shape), one.file, one.begin, strides=one.strides) for one, at in solid)
        inventory.tensors[key] = Saved(first.dtype, shape, chunks)
    inventory.notes.append(
        "Its shards do not tell the shapes of whole tensors, which are taken from the chunks: if the last shard were "
        "missing, that could not be noticed."
    )
    return inventory


def _shard_entries(files: Files, folder: str, shards: list[str]) -> Iterator[tuple[str, StoredTensor, tuple[int, ...]]]:
    for name in shards:
        tensors, metadata = read_safetensors(files, folder + name)
        label = files.label(folder + name)
        boxes = _sharding(metadata, label)
        for key, stored in tensors.items():
            offsets = _offsets(boxes, key, label)
            if len(offsets) != len(stored.shape):
                raise corrupt(label, f"its offsets {list(offsets)} do not fit its shape {list(stored.shape)}", key)
            yield key, stored, offsets


def _sharding(metadata: dict[str, str], label: str) -> dict[str, Any]:
    try:
        boxes = json.loads(metadata.get(_SHARDING, ""))
    except (ValueError, RecursionError) as error:
        raise corrupt(label, f"its header does not tell which boxes it holds ({_SHARDING})") from error
    if not isinstance(boxes, dict):
        raise corrupt(label, f"its {_SHARDING} is not an object")
    return boxes


def _offsets(boxes: dict[str, Any], key: str, label: str) -> tuple[int, ...]:
    entry = boxes.get(key)
    offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or not _counts(tuple(offsets)):
        raise corrupt(label, "its header does not tell where the shard begins", key)
    return tuple(offsets)


def _counts(value: Any) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(type(one) is int and 0 <= one < 2**63 for one in value)


def _is_path(path: tuple[Any, ...], key: str) -> bool:
    plain = 0 < len(path) <= MAX_DEPTH and all(type(part) in (str, int) for part in path)
    return plain and ".".join(map(str, path)) == key


def _words(value: Any) -> str:
    """A value of unknown type in a message."""
    if isinstance(value, Record):
        return str(value.name)[:100]
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        return ", ".join(value)[:200]
    return type(value).__name__
