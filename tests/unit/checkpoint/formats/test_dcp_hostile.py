"""Metadata that torch never writes: every one of them is a clean error."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import get_state_dict

from orchestrator.core.errors import CheckpointError, CorruptCheckpoint
from tests.unit.checkpoint.formats.dcp_saving import opened, read, save, trained


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save({"model": {"w": torch.arange(12.0).reshape(3, 4), "v": torch.ones(2)}}, tmp_path / "saved")


def change(directory: Path, edit: Callable[[Any], None]) -> Path:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    edit(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return directory


def chunks(metadata: Any, *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Let `model.w` have these chunks, each in the bytes that the only one has now."""
    info = metadata.storage_data.pop(MetadataIndex("model.w", (0, 0)))
    listed = metadata.state_dict_metadata["model.w"].chunks
    listed.clear()
    for offsets, sizes in boxes:
        listed.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        metadata.storage_data[MetadataIndex("model.w", offsets)] = info


def place(metadata: Any, **fields: Any) -> None:
    info = metadata.storage_data[MetadataIndex("model.w", (0, 0))]
    for key, value in fields.items():
        setattr(info, key, value)


def grow(metadata: Any) -> None:
    size = torch.Size((3 << 40, 4))
    metadata.state_dict_metadata["model.w"].size = size
    metadata.state_dict_metadata["model.w"].chunks[0].sizes = size


def share(metadata: Any) -> None:
    """The bytes of `model.v` stand for 1000 tensors."""
    for index in range(1000):
        key = f"model.v{index}"
        metadata.state_dict_metadata[key] = metadata.state_dict_metadata["model.v"]
        metadata.storage_data[MetadataIndex(key, (0,))] = metadata.storage_data[MetadataIndex("model.v", (0,))]


CASES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a file outside": (lambda m: place(m, relative_path="../saved/__0_0.distcp"), "which is not there"),
    "a file that is not there": (lambda m: place(m, relative_path="__1_0.distcp"), "which is not there"),
    "bytes beyond the end": (lambda m: place(m, offset=1 << 40), "beyond its"),
    "a negative offset": (lambda m: place(m, offset=-1), "name no bytes"),
    "an offset that is none": (lambda m: place(m, offset="0"), "name no bytes"),
    "a hole": (lambda m: chunks(m, ((0, 0), (2, 4))), r"no chunk holds \[2:3, 0:4\]"),
    "a chunk outside": (lambda m: chunks(m, ((1, 0), (3, 4))), "outside its shape"),
    "chunks that overlap": (lambda m: chunks(m, ((0, 0), (2, 4)), ((1, 0), (2, 4))), "another entry|overlap"),
    "a chunk without bytes": (lambda m: m.storage_data.clear(), "no file holds"),
    "a huge shape": (grow, "does not fit its"),
    "bytes that are shared": (share, "those of another entry, too"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", [1]), "not a mapping"),
    "an unknown entry": (lambda m: m.state_dict_metadata.update({"model.w": 3}), "where a TensorStorageMetadata"),
    "a dtype that is none": (lambda m: setattr(m.state_dict_metadata["model.w"], "properties", 1), "dtype is not told"),
}


@pytest.mark.parametrize("name", CASES)
def test_damage_is_told_with_file_and_tensor(saved: Path, name: str) -> None:
    edit, message = CASES[name]
    change(saved, edit)
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        opened(saved)
    assert (caught.value.file is not None and ".metadata" in caught.value.file) or "__0_0" in str(caught.value)


def test_a_chunk_of_another_shape_than_its_bytes_is_found_when_read(saved: Path) -> None:
    change(saved, lambda m: setattr(m.state_dict_metadata["model.w"], "size", torch.Size((4, 3))))
    change(saved, lambda m: setattr(m.state_dict_metadata["model.w"].chunks[0], "sizes", torch.Size((4, 3))))
    view = opened(saved)
    with pytest.raises(CorruptCheckpoint, match=r"at tensor w: at byte \d+ it holds F32 \[3, 4\] where F32 \[4, 3\]"):
        read(view, "w")


def test_a_pickle_that_would_run_code_runs_none(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    change(saved, lambda m: m.state_dict_metadata.update({"model.w": Evil()}))
    with pytest.raises(CorruptCheckpoint):
        opened(saved)
    assert not marker.exists()


def test_an_entry_that_would_run_code_runs_none(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    directory = save({"model": {"w": torch.ones(2)}, "evil": Evil()}, tmp_path / "saved")
    view = opened(directory)
    assert "evil is left out" in view.notes[0] and not marker.exists()


def test_storage_of_another_writer_is_refused(saved: Path) -> None:
    change(saved, lambda m: m.storage_data.update(dict.fromkeys(m.storage_data, "elsewhere")))
    with pytest.raises(CorruptCheckpoint, match="where a _StorageInfo is expected"):
        opened(saved)


def test_missing_transform_descriptors_are_none(saved: Path) -> None:
    """As older torch wrote it."""
    info = _StorageInfo("__0_0.distcp", 0, 1)
    assert "transform_descriptors" not in info.__getstate__()
    opened(saved)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_are_errors_or_change_nothing_that_matters(tmp_path: Path, seed: int) -> None:
    """Never another exception, and what opens reads without one."""
    chance = random.Random(seed)
    model, optimizer = trained()
    weights, states = get_state_dict(model, optimizer)
    directory = save({"model": weights, "optim": states}, tmp_path)
    files = {path: path.read_bytes() for path in (directory / ".metadata", directory / "__0_0.distcp")}
    for _ in range(40):
        path = chance.choice(list(files))
        data = bytearray(files[path])
        for _ in range(chance.choice([1, 1, 4])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        try:
            view = opened(directory)
            for name, tensor in view.tensors.items():
                assert tensor.size_bytes < 1 << 20
                read(view, name)
        except CheckpointError:
            pass
        path.write_bytes(files[path])
