"""Reading boxes: only what is asked for, only what is there, only what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.layout import Box, Chunk, LogicalTensor
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint
from tests.unit.checkpoint.saving import STEP, WEIGHT, save


@pytest.fixture
def view(tmp_path: Path) -> UniversalView:
    return native.open_view(tmp_path, save(tmp_path, world_size=3).path)


def test_a_box_across_ranks(view: UniversalView) -> None:
    out = np.zeros((5, 2), np.float32)
    assert view.read("w", Box((1, 3), (5, 2)), out) == 40
    assert (out == WEIGHT[1:6, 3:5] + 40).all()


@pytest.mark.parametrize(
    "make", [bytearray, lambda size: memoryview(bytearray(size)), lambda size: np.zeros(size // 4, np.float32)]
)
def test_any_writable_buffer_of_the_right_size_will_do(view: UniversalView, make: Any) -> None:
    out = make(8 * 6 * 4)
    view.read("w", Box.whole((8, 6)), out)
    assert bytes(out) == (WEIGHT + 40).tobytes()


def test_a_scalar(view: UniversalView) -> None:
    out = np.zeros((), np.float32)
    assert view.read("w.step", Box((), ()), out, check=True) == 4
    assert out == STEP


def test_nothing_of_a_tensor(view: UniversalView) -> None:
    assert view.read("w", Box((8, 0), (0, 6)), np.zeros((0, 6), np.float32)) == 0


@pytest.mark.parametrize("size", [0, 4, 47 * 4, 49 * 4])
def test_a_buffer_of_another_size_is_refused(view: UniversalView, size: int) -> None:
    with pytest.raises(CheckpointError, match=f"has 192 bytes but the buffer for it has {size}"):
        view.read("w", Box.whole((8, 6)), bytearray(size))


@pytest.mark.parametrize("box", [Box((0, 0), (9, 6)), Box((-1, 0), (2, 6)), Box((0,), (8,)), Box((), ())])
def test_a_box_outside_the_tensor_is_refused(view: UniversalView, box: Box) -> None:
    with pytest.raises(CheckpointError, match=r"w has shape \[8, 6\].*made by another model"):
        view.read("w", box, bytearray(192))


def test_an_unknown_tensor_is_refused(view: UniversalView) -> None:
    with pytest.raises(CheckpointError, match="step 40 has no v: it was made by another model"):
        view.read("v", Box((), ()), bytearray(4))


def test_files_that_no_wanted_box_is_in_are_not_opened(tmp_path: Path) -> None:
    done = save(tmp_path)
    view = native.open_view(tmp_path, done.path)
    (tmp_path / done.path / "part-00001.safetensors").unlink()
    out = np.zeros((4, 6), np.float32)
    view.read("w", Box((0, 0), (4, 6)), out)
    assert (out == WEIGHT[:4] + 40).all()
    with pytest.raises(CorruptCheckpoint, match=r"part-00001\.safetensors is corrupt at tensor w: it is missing"):
        view.read("w", Box((3, 0), (2, 6)), bytearray(48))


@pytest.mark.parametrize("left", [0.0, 0.5, 0.999])
def test_a_file_cut_after_the_view_was_built(tmp_path: Path, left: float) -> None:
    done = save(tmp_path)
    view = native.open_view(tmp_path, done.path)
    end = view.tensors["w"].chunks[1].begin + 96
    with (tmp_path / done.path / "part-00001.safetensors").open("r+b") as file:
        file.truncate(int(left * end))
    with pytest.raises(CorruptCheckpoint, match=r"part-00001\.safetensors is corrupt at tensor w"):
        view.read("w", Box((4, 0), (4, 6)), bytearray(96))


def test_a_chunk_read_whole_is_checked_when_asked(tmp_path: Path) -> None:
    done = save(tmp_path)
    view = native.open_view(tmp_path, done.path)
    chunk = view.tensors["w"].chunks[1]
    with (tmp_path / done.path / chunk.file).open("r+b") as file:
        file.seek(chunk.begin + 5)
        file.write(b"\xaa")
    view.read("w", Box.whole((8, 6)), bytearray(192))
    view.read("w", Box((0, 0), (4, 6)), bytearray(96), check=True)
    with pytest.raises(
        CorruptCheckpoint, match=r"part-00001\.safetensors is corrupt at tensor w: the bytes of chunk \[4"
    ):
        view.read("w", Box((2, 0), (6, 6)), bytearray(144), check=True)


def test_missing_elements_are_named(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(range(8)))
    tensor = LogicalTensor("t", "t", None, "buffer", "U8", (4, 4), (Chunk(Box((0, 0), (2, 4)), "raw", 0),))
    view = UniversalView(LocalFiles(tmp_path), step=1, generation=1, state={}, tensors={"t": tensor})
    out = bytearray(8)
    view.read("t", Box((0, 0), (2, 4)), out)
    assert out == bytes(range(8))
    with pytest.raises(CorruptCheckpoint, match=r"at tensor t: no chunk holds \[2:3, 1:3\]"):
        view.read("t", Box((1, 1), (2, 2)), bytearray(4))


def test_an_unaligned_chunk_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"xyz" + WEIGHT.tobytes())
    tensor = LogicalTensor("t", "t", None, "buffer", "F32", (8, 6), (Chunk(Box.whole((8, 6)), "raw", 3),))
    view = UniversalView(LocalFiles(tmp_path), step=1, generation=1, state={}, tensors={"t": tensor})
    out = np.zeros((8, 2), np.float32)
    view.read("t", Box((0, 2), (8, 2)), out)
    assert (out == WEIGHT[:, 2:4]).all()


def pieces(view: UniversalView, name: str, box: Box) -> bytes | None:
    runs = view.runs(name, box)
    if runs is None:
        return None
    found = bytearray()
    for file, begin, count in runs:
        found += view.files.span(file, begin, count)
    return bytes(found)


def test_rows_of_several_ranks_are_runs_of_their_files(view: UniversalView) -> None:
    assert pieces(view, "w", Box((1, 0), (6, 6))) == (WEIGHT[1:7] + 40).tobytes()


def test_columns_are_no_run(view: UniversalView) -> None:
    assert view.runs("w", Box((1, 2), (6, 2))) is None


def test_columns_of_one_row_are_a_run(view: UniversalView) -> None:
    assert pieces(view, "w", Box((2, 1), (1, 4))) == (WEIGHT[2:3, 1:5] + 40).tobytes()


def test_what_is_exchanged_averaged_or_in_the_metadata_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(WEIGHT.tobytes())
    whole, plain = Box.whole((6, 8)), Chunk(Box.whole((6, 8)), "raw", 0)
    tensors = {
        "t": LogicalTensor("t", "t", None, "buffer", "F32", (6, 8), (Chunk(whole, "raw", 0, strides=(1, 6)),)),
        "m": LogicalTensor("m", "m", None, "buffer", "F32", (6, 8), (plain,), others=((plain,),), average=True),
        "d": LogicalTensor("d", "d", None, "buffer", "F32", (1,), (Chunk(Box.whole((1,)), "", 0, data=bytes(4)),)),
        "r": LogicalTensor("r", "r", None, "buffer", "F32", (6, 8), (plain,)),
    }
    view = UniversalView(LocalFiles(tmp_path), step=1, generation=1, state={}, tensors=tensors)
    assert [view.runs(name, Box.whole(tensors[name].shape)) for name in "tmdr"] == [None, None, None, [("raw", 0, 192)]]


def test_runs_lack_no_element(tmp_path: Path) -> None:
    tensor = LogicalTensor("t", "t", None, "buffer", "U8", (4, 4), (Chunk(Box((0, 0), (2, 4)), "raw", 0),))
    view = UniversalView(LocalFiles(tmp_path), step=1, generation=1, state={}, tensors={"t": tensor})
    with pytest.raises(CorruptCheckpoint, match="no chunk holds"):
        view.runs("t", Box.whole((4, 4)))
