"""Damage of every kind is found, and named by file and tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import files as files_module
from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.manifest import MANIFEST, PartEntry, decode_manifest, digest_of, encode_manifest
from orchestrator.checkpoint.verify import verify
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint
from tests.unit.checkpoint.saving import WEIGHT, commit, piece, save, write_all

NAME = "step-00000040-gen-0003"


def test_a_good_checkpoint(tmp_path: Path) -> None:
    done = save(tmp_path)
    for threads in (1, 4):
        verified = verify(tmp_path.as_uri(), done.path, threads=threads)
        assert verified.tensors == 4
        assert verified.bytes == sum(path.stat().st_size for path in (tmp_path / NAME).glob("*.safetensors"))
        assert verified.seconds > 0


def test_chunks_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "BLOCK_BYTES", 7)
    done = save(tmp_path)
    assert verify(tmp_path, done.path).tensors == 4
    flip(tmp_path / NAME / "part-00001.safetensors", -1)
    with pytest.raises(CorruptCheckpoint, match="do not match"):
        verify(tmp_path, done.path)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ (1 << (at % 8))]))


@pytest.mark.parametrize(
    "file", ["part-00000.safetensors", "part-00001.safetensors", "part-00000.json", "part-00001.json", MANIFEST]
)
def test_a_flipped_bit_in_any_byte_of_any_file(tmp_path: Path, file: str) -> None:
    save(tmp_path)
    path = tmp_path / NAME / file
    chunks = {
        range(chunk.begin, chunk.begin + chunk.box.elements * tensor.item_bytes): name
        for name, tensor in native.open_view(tmp_path, NAME).tensors.items()
        for chunk in tensor.chunks
        if chunk.file == file
    }
    for at in range(path.stat().st_size):
        flip(path, at)
        with pytest.raises(CorruptCheckpoint) as raised:
            verify(tmp_path, NAME, threads=1)
        assert f"{NAME}/{file} is corrupt" in str(raised.value)
        for bytes_of, name in chunks.items():
            if at in bytes_of:
                assert f"at tensor {name}:" in str(raised.value)
        flip(path, at)  # back again
    verify(tmp_path, NAME)


def cut(name: str, to: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(to)

    return apply


def swap(one: str, other: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / one).rename(folder / "x")
        (folder / other).rename(folder / one)
        (folder / "x").rename(folder / other)

    return apply


def swap_both(folder: Path) -> None:
    swap("part-00000.json", "part-00001.json")(folder)
    swap("part-00000.safetensors", "part-00001.safetensors")(folder)


def grow(folder: Path) -> None:
    with (folder / "part-00001.safetensors").open("ab") as file:
        file.write(b"\0")


def empty_directory_instead(folder: Path) -> None:
    (folder / "part-00001.safetensors").unlink()
    (folder / "part-00001.safetensors").mkdir()


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (cut("part-00001.safetensors", 0), r"part-00001\.safetensors is corrupt at tensor w: it has 0 bytes instead of"),
    (
        cut("part-00001.safetensors", 350),
        r"part-00001\.safetensors is corrupt at tensor w.* it has 350 bytes instead of",
    ),
    (cut("part-00001.json", 100), r"part-00001\.json is corrupt"),
    (cut(MANIFEST, 0), r"manifest\.json is corrupt: it is not JSON"),
    (grow, r"part-00001\.safetensors is corrupt: it has"),
    (empty_directory_instead, r"part-00001\.safetensors is corrupt"),
    (
        lambda folder: (folder / "part-00001.safetensors").unlink(),
        r"part-00001\.safetensors is corrupt at tensor w: it is m",
    ),
    (lambda folder: (folder / "part-00001.json").unlink(), r"part-00001\.json is corrupt: it is missing"),
    (lambda folder: (folder / "part-00001.json").rename(folder / "part-1.json"), r"part-00001\.json .* it is missing"),
    (swap("part-00000.json", "part-00001.json"), r"part-00000\.json is corrupt: its checksum"),
    (swap("part-00000.safetensors", "part-00001.safetensors"), r"part-0000.\.safetensors is corrupt"),
    (swap_both, r"part-00000\.json is corrupt: its checksum"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    save(tmp_path)
    damage(tmp_path / NAME)
    with pytest.raises(CorruptCheckpoint, match=f"{NAME}/{words}"):
        verify(tmp_path, NAME)


def test_parts_of_another_step_or_generation(tmp_path: Path) -> None:
    save(tmp_path)
    other = save(tmp_path, step=60, generation=4)
    for name in ("part-00001.json", "part-00001.safetensors"):
        shutil.copy(tmp_path / other.path / name, tmp_path / NAME / name)
    with pytest.raises(CorruptCheckpoint, match=r"part-00001\.json is corrupt"):
        verify(tmp_path, NAME)


def test_a_renamed_checkpoint(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / NAME).rename(tmp_path / "step-00000050-gen-0003")
    with pytest.raises(CorruptCheckpoint, match="belongs to step 40 of generation 3, so it was moved here"):
        verify(tmp_path, "step-00000050-gen-0003")


def rewrite(folder: Path, rank: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit a part manifest and put the right checksums over it: what only an attacker or a bug of ours would do."""
    path = folder / f"part-{rank:05d}.json"
    data = json.loads(path.read_bytes())
    change(data)
    text = json.dumps(data).encode()
    path.write_bytes(text)
    manifest = decode_manifest((folder / MANIFEST).read_bytes(), "")
    size = int(data["file_bytes"]) + len(text)
    entries = [PartEntry(rank, digest_of(text), size) if one.rank == rank else one for one in manifest.parts]
    (folder / MANIFEST).write_bytes(encode_manifest(replace(manifest, parts=tuple(entries))))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rank", 0, r"part-00001\.json is corrupt: it belongs to rank 0 of 2"),
        ("world_size", 3, r"it belongs to rank 1 of 3"),
        ("step", 41, "step 41"),
        ("generation", 4, "generation 4"),
    ],
)
def test_a_part_manifest_out_of_place(tmp_path: Path, key: str, value: int, words: str) -> None:
    save(tmp_path)
    rewrite(tmp_path / NAME, 1, lambda data: data.update({key: value}))
    with pytest.raises(CorruptCheckpoint, match=words):
        verify(tmp_path, NAME)


def taller(data: dict[str, Any]) -> None:
    """`w` has a row more, its moment does not."""
    data["forms"]["shape"][0] = [9, 6]


def moved(data: dict[str, Any]) -> None:
    """`w`'s rows are at another place, its moment's are where they were."""
    data["boxes"]["offsets"].append([3, 0])
    data["boxes"]["sizes"].append([4, 6])
    data["chunks"]["box"][0] = len(data["boxes"]["sizes"]) - 1


def test_a_tensor_that_ranks_disagree_about(tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path / NAME, 1, taller)
    with pytest.raises(
        CorruptCheckpoint, match=r"part-00001\.json is corrupt at tensor w: it is a parameter of F32 \[9"
    ):
        verify(tmp_path, NAME)


def test_chunks_that_overlap_in_part(tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path / NAME, 1, moved)
    with pytest.raises(CorruptCheckpoint, match=r"at tensor w: chunks \[0:4, 0:6\] and \[3:7, 0:6\] overlap"):
        verify(tmp_path, NAME)


def test_elements_that_nobody_holds(tmp_path: Path) -> None:
    save(tmp_path)
    for rank in (0, 1):
        rewrite(tmp_path / NAME, rank, taller)
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json is corrupt at tensor w: no chunk holds \[8:9, 0:6\]"):
        verify(tmp_path, NAME)


def test_replicas_that_differ(tmp_path: Path) -> None:
    reports = [
        native.write_part(
            tmp_path,
            generation=3,
            step=40,
            rank=rank,
            world_size=2,
            pieces=[piece("w", WEIGHT + rank)],
            state={},
            stall_s=0,
        )
        for rank in range(2)
    ]
    commit(tmp_path, reports)
    with pytest.raises(CorruptCheckpoint, match=r"at tensor w: the replicas of chunk \[0:8, 0:6\] differ"):
        verify(tmp_path, NAME)


def test_what_is_not_there_is_not_called_corrupt(tmp_path: Path) -> None:
    write_all(tmp_path)
    with pytest.raises(CheckpointError, match="no committed checkpoint") as raised:
        verify(tmp_path, NAME)
    assert not isinstance(raised.value, CorruptCheckpoint)
