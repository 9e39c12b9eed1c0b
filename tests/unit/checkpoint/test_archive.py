"""torch.save archives and safetensors files: where each tensor lies, and nothing wrong if they are damaged."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from orchestrator.checkpoint.archive import (
    TORCH_DTYPES,
    StoredTensor,
    check_records,
    load_archive,
    open_blob,
    read_safetensors,
    walk,
)
from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.layout import Box, Chunk, LogicalTensor
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CorruptCheckpoint


def read(files: LocalFiles, one: StoredTensor) -> bytes:
    """The tensor's elements, row-major."""
    chunk = Chunk(Box.whole(one.shape), one.file, one.begin, strides=one.strides)
    tensor = LogicalTensor("t", "t", None, "buffer", one.dtype, one.shape, (chunk,))
    out = bytearray(one.size_bytes)
    UniversalView(files, step=0, generation=0, state={}, tensors={"t": tensor}).read("t", Box.whole(one.shape), out)
    return bytes(out)


def expected(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


BASE = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
TENSORS = {
    "plain": BASE,
    "transposed": BASE.permute(2, 0, 1),
    "slice": BASE[1:, ::2, 1:4],
    "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_any_strides(tmp_path: Path, name: str) -> None:
    torch.save({"t": TENSORS[name]}, tmp_path / "a.pt")
    files = LocalFiles(tmp_path)
    found = load_archive(files, "a.pt")["t"]
    assert found.shape == tuple(TENSORS[name].shape)
    assert read(files, found) == expected(TENSORS[name])


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_tensors_of_any_dtype(tmp_path: Path, dtype: str) -> None:
    tensor = torch.arange(6).to(getattr(torch, dtype))
    torch.save(tensor, tmp_path / "a.pt")
    files = LocalFiles(tmp_path)
    found = load_archive(files, "a.pt")
    assert found.dtype == TORCH_DTYPES[dtype]
    assert read(files, found) == expected(tensor)


def test_a_whole_training_state(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "size": torch.Size([1, 2])}
    torch.save(state, tmp_path / "a.pt")
    files = LocalFiles(tmp_path)
    found = load_archive(files, "a.pt")
    assert found["size"] == (1, 2)
    assert found["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert read(files, found["optimizer"]["state"][0]["exp_avg"]) == expected(
        optimizer.state_dict()["state"][0]["exp_avg"]
    )
    assert len(list(walk(found))) == 2 + 2 * 3


def test_a_blob_within_a_file(tmp_path: Path) -> None:
    torch.save(BASE, tmp_path / "a.pt")
    save_file({"x": BASE}, tmp_path / "b.safetensors")
    first, second = (tmp_path / "a.pt").read_bytes(), (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "all").write_bytes(b"front" + first + second + b"back")
    files = LocalFiles(tmp_path)
    assert read(files, open_blob(files, "all", 5, len(first))) == expected(BASE)
    assert read(files, open_blob(files, "all", 5 + len(first), len(second))) == expected(BASE)


def test_nothing_in_an_archive_is_called(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "made"),))

    torch.save({"x": Evil()}, tmp_path / "a.pt")
    load_archive(LocalFiles(tmp_path), "a.pt")
    assert not (tmp_path / "made").exists()


def rewrite(path: Path, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """The archive with other contents of some records; None leaves one out."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records.items():
            short = name.split("/", 1)[1]
            if change.get(short, b"") is not None:
                new.writestr(name, change.get(short) or data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data/0": None}, "storage 0 is missing"),
        ({"data/0": b"1234"}, "storage 0 has 4 bytes"),
        ({"byteorder": b"big"}, "not little-endian"),
        ({"data.pkl": None}, "no data.pkl"),
        ({"data.pkl": b"\x80\x02X"}, "its pickle is not read"),
    ],
)
def test_a_record_that_is_wrong(tmp_path: Path, change: dict[str, bytes | None], reason: str) -> None:
    torch.save(BASE, tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", change)
    with pytest.raises(CorruptCheckpoint, match=rf"a\.pt is corrupt: .*{reason}"):
        load_archive(LocalFiles(tmp_path), "a.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(1000), tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptCheckpoint, match="is compressed"):
        load_archive(LocalFiles(tmp_path), "a.pt")


def test_torch_s_old_format_is_named(tmp_path: Path) -> None:
    torch.save(BASE, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptCheckpoint, match=r"format from before 1\.6: load and save it again"):
        load_archive(LocalFiles(tmp_path), "a.pt")


def test_a_flipped_bit_is_found_by_the_crc(tmp_path: Path) -> None:
    torch.save(BASE, tmp_path / "a.pt")
    files = LocalFiles(tmp_path)
    size = (tmp_path / "a.pt").stat().st_size
    counts = check_records(files, "a.pt", 0, size)
    assert counts is not None
    assert counts[0] >= BASE.nbytes
    assert counts[1] == 0
    begin = load_archive(files, "a.pt").begin
    with (tmp_path / "a.pt").open("r+b") as file:
        file.seek(begin + 17)
        file.write(b"\x55")
    with pytest.raises(CorruptCheckpoint, match=r"record .*data/0 does not match its CRC-32"):
        check_records(files, "a.pt", 0, size)


def test_an_archive_without_checksums_is_read_but_not_proven(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(BASE, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    counts = check_records(LocalFiles(tmp_path), "a.pt", 0, (tmp_path / "a.pt").stat().st_size)
    assert counts is not None
    assert counts[0] == 0
    assert counts[1] >= BASE.nbytes


@pytest.mark.parametrize("step", [7, 64, 301])
def test_a_shortened_archive_is_refused(tmp_path: Path, step: int) -> None:
    torch.save({"t": BASE}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for length in range(0, len(whole), step):
        (tmp_path / "b.pt").write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpoint, match=r"b\.pt is corrupt"):
            load_archive(LocalFiles(tmp_path), "b.pt")


def header(entries: dict[str, Any], data: bytes = bytes(64)) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


F4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "too few"),
        (b"\xff" * 8 + b"{}", "does not fit"),
        (header({})[:-64].replace(b"{}", b"[]"), "not an object"),
        ((9).to_bytes(8, "little") + b"{'a': 1} ", "not JSON"),
        (header({"a": F4, "b": F4}), "overlap those of another tensor"),
        (header({"a": F4 | {"data_offsets": [0, 2**60]}}), "do not fit"),
        (header({"a": F4 | {"data_offsets": [-16, 0]}}), "not counts"),
        (header({"a": F4 | {"shape": [2**40, 2**40]}}), "do not fit"),
        (header({"a": F4 | {"shape": [-4]}}), "not counts"),
        (header({"a": F4 | {"shape": [True]}}), "not counts"),
        (header({"a": F4 | {"dtype": "F33"}}), "dtype 'F33' is unknown"),
        (header({"a": F4 | {"dtype": ["F32"]}}), "is unknown"),
        (header({"a": 3}), "not an object"),
        (header({"a": F4 | {"shape": [4] + [1] * 70}}), "not counts"),
        (header({"__metadata__": {"a": 3}}), "metadata"),
    ],
)
def test_a_hostile_safetensors_header(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=rf"a\.safetensors is corrupt.*{reason}"):
        read_safetensors(LocalFiles(tmp_path), "a.safetensors")


def test_safetensors_of_another_writer(tmp_path: Path) -> None:
    save_file({"a": BASE, "b": torch.zeros((), dtype=torch.int64)}, tmp_path / "a.safetensors", {"k": "v"})
    files = LocalFiles(tmp_path)
    tensors, metadata = read_safetensors(files, "a.safetensors")
    assert metadata == {"k": "v"}
    assert np.frombuffer(read(files, tensors["a"]), np.float32).tolist() == BASE.reshape(-1).tolist()


def test_a_flipped_bit_among_the_names_is_found_by_the_crc(tmp_path: Path) -> None:
    torch.save({"first": torch.ones(3)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data.replace(b"first", b"fir3t"))
    with pytest.raises(CorruptCheckpoint, match=r"record x/data.pkl does not match its CRC-32"):
        load_archive(LocalFiles(tmp_path), "x.pt")


def test_expanded_tensors_are_read_but_do_not_make_a_small_file_huge(tmp_path: Path) -> None:
    torch.save({"mask": torch.ones(1).expand(5, 100)}, tmp_path / "x.pt")
    files = LocalFiles(tmp_path)
    assert read(files, load_archive(files, "x.pt")["mask"]) == expected(torch.ones(5, 100))
    for shape in ((1 << 40,), (1 << 20, 1 << 20), (1 << 12, 1 << 12, 3)):
        torch.save({"mask": torch.ones(1).expand(shape)}, tmp_path / "y.pt")
        with pytest.raises(CorruptCheckpoint, match=r"y\.pt is corrupt.* repeats a storage of 4 bytes too often"):
            load_archive(files, "y.pt")


def test_a_number_that_is_read_with_the_metadata_has_its_checksum_compared(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"step": torch.tensor(7.0)}, path)
    data = bytearray(path.read_bytes())
    at = data.index(np.float32(7.0).tobytes())
    data[at + 1] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"a\.pt is corrupt: record a/data/0 does not match its CRC-32"):
        load_archive(LocalFiles(tmp_path), "a.pt")


@pytest.mark.parametrize("damage", [slice(26, 30), slice(30, 32)], ids=["lengths", "name"])
def test_a_record_is_called_the_same_where_it_lies(tmp_path: Path, damage: slice) -> None:
    """Without the name's length its first bytes would pass for the record's contents."""
    path = tmp_path / "a.pt"
    torch.save(BASE, path)
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo("a/data/0").header_offset
    data = bytearray(path.read_bytes())
    data[begin + damage.start : begin + damage.stop] = bytes(damage.stop - damage.start)
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="a/data/0 has another name where it lies"):
        load_archive(LocalFiles(tmp_path), "a.pt")
