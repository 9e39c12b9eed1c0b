"""Parts as files: what other tools see, what is refused, what two writers may do to each other."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from orchestrator.checkpoint import store
from orchestrator.checkpoint.durable import locked
from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.layout import Box, Piece
from orchestrator.checkpoint.verify import verify
from orchestrator.core.errors import CheckpointError, Refused
from tests.unit.checkpoint.saving import (
    BUFFER,
    MOMENT,
    STEP,
    WEIGHT,
    commit,
    piece,
    rows,
    save,
    write_all,
    write_rank,
)


def write(root: Path, pieces: list[Piece], state: dict[str, Any] | None = None, rank: int = 0) -> Any:
    return native.write_part(
        root, generation=1, step=1, rank=rank, world_size=1, pieces=pieces, state=state or {}, stall_s=0.0
    )


def test_the_report_tells_what_was_written(tmp_path: Path) -> None:
    report = write_rank(tmp_path, 1)
    part = tmp_path / report.part
    assert report.part == "step-00000040-gen-0003/part-00001.json"
    assert (report.generation, report.step, report.rank, report.stall_s) == (3, 40, 1, 0.25)
    assert report.write_s > 0
    assert report.size_bytes == part.stat().st_size + part.with_suffix(".safetensors").stat().st_size
    assert sorted(path.name for path in part.parent.iterdir()) == ["part-00001.json", "part-00001.safetensors"]


def test_what_was_saved_by_two_ranks_reads_back_whole(tmp_path: Path) -> None:
    view = native.open_view(tmp_path, save(tmp_path).path)
    assert (view.step, view.generation) == (40, 3)
    for name, array in {"w": WEIGHT + 40, "w.exp_avg": MOMENT, "w.step": STEP, "b": BUFFER}.items():
        out = np.zeros_like(array)
        assert view.read(name, Box.whole(array.shape), out) == array.nbytes
        assert out.tobytes() == array.tobytes()
    assert view.tensors["w.exp_avg"].parameter == "w"
    assert view.tensors["w.exp_avg"].state == "exp_avg"
    assert [view.tensors[name].kind for name in ("w", "w.step", "b")] == ["parameter", "state", "buffer"]
    assert view.tensors["b"].dtype == "BF16"


def test_the_data_file_is_a_valid_safetensors_file(tmp_path: Path) -> None:
    done = save(tmp_path)
    with safe_open(tmp_path / done.path / "part-00001.safetensors", "numpy") as file:
        assert set(file.keys()) == {"w@4,0", "w.exp_avg@4,0"}
        assert (file.get_tensor("w@4,0") == WEIGHT[4:] + 40).all()
    with safe_open(tmp_path / done.path / "part-00000.safetensors", "numpy") as file:
        assert file.get_tensor("w.step@").shape == ()
        assert file.get_slice("b@0").get_shape() == [5]
        assert file.get_slice("b@0").get_dtype() == "BF16"


def test_several_chunks_of_one_tensor_lie_in_one_part(tmp_path: Path) -> None:
    columns = [Box((0, 0), (8, 2)), Box((0, 2), (8, 4))]
    report = write(tmp_path, [piece("w", WEIGHT, box) for box in columns])
    done = commit(tmp_path, [report])
    out = np.zeros((2, 3), np.float32)
    native.open_view(tmp_path, done.path).read("w", Box((3, 1), (2, 3)), out)
    assert (out == WEIGHT[3:5, 1:4]).all()


def test_chunks_are_aligned_whatever_the_order_of_pieces(tmp_path: Path) -> None:
    flags = np.array([True, False, True])
    write(tmp_path, [piece("flags", flags, kind="buffer"), piece("b", BUFFER, kind="buffer"), piece("w", WEIGHT)])
    manifest = json.loads((tmp_path / "step-00000001-gen-0001/part-00000.json").read_bytes())
    begins = dict(zip(manifest["parameters"], manifest["chunks"]["begin"], strict=True))
    assert begins["w"] % 8 == 0
    assert begins["b"] % 2 == 0


def test_a_rank_may_hold_nothing(tmp_path: Path) -> None:
    reports = [
        native.write_part(tmp_path, generation=1, step=1, rank=rank, world_size=2, pieces=pieces, state={}, stall_s=0)
        for rank, pieces in enumerate([[piece("w", WEIGHT)], []])
    ]
    done = commit(tmp_path, reports)
    assert verify(tmp_path, done.path).tensors == 1


def test_tensors_without_elements_are_kept(tmp_path: Path) -> None:
    done = commit(tmp_path, [write(tmp_path, [piece("none", np.zeros((0, 4), np.float32))])])
    view = native.open_view(tmp_path, done.path)
    assert view.tensors["none"].shape == (0, 4)
    assert view.read("none", Box((0, 0), (0, 4)), bytearray()) == 0
    assert verify(tmp_path, done.path).tensors == 1


def test_states_of_the_ranks_are_merged(tmp_path: Path) -> None:
    groups = [
        [{"lr": 0.5, "params": ["a", "b"]}],
        [{"lr": 0.5, "params": ["b", "c"]}, {"lr": 0.1, "params": ["d"]}],
    ]
    reports = [
        native.write_part(
            tmp_path,
            generation=1,
            step=1,
            rank=rank,
            world_size=2,
            pieces=[piece("w", WEIGHT, rows(rank, 2))],
            state={"param_groups": groups[rank], "extra": {"scheduler": {"last": rank}}, "sampler": {"rank": rank}},
            stall_s=0,
        )
        for rank in range(2)
    ]
    assert native.open_view(tmp_path, commit(tmp_path, reports).path).state == {
        "param_groups": [{"lr": 0.5, "params": ["a", "b", "c"]}, {"lr": 0.1, "params": ["d"]}],
        "extra": {"scheduler": {"last": 0}},
        "sampler": {"rank": 0},
    }


def test_numbers_of_the_state_keep_every_bit(tmp_path: Path) -> None:
    state = {"extra": {"lr": 0.1 + 0.2, "none": None, "huge": 2**70, "inf": math.inf, "text": "é\n"}}
    done = commit(tmp_path, [write(tmp_path, [piece("w", WEIGHT)], state)])
    assert native.open_view(tmp_path, done.path).state == state


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (replace(piece("w", WEIGHT), dtype="F4"), "dtype F4"),
        (replace(piece("w", WEIGHT), kind="weight"), "a weight of"),
        (replace(piece("w", WEIGHT), state="exp_avg"), "w.exp_avg is a parameter"),
        (replace(piece("w", WEIGHT), box=Box((1, 0), (8, 6))), "does not hold the box"),
        (replace(piece("w", WEIGHT), box=Box((0,), (8,))), "does not hold the box"),
        (replace(piece("w", WEIGHT), dtype="F64"), "does not fit its 192 bytes"),
        (replace(piece("w", WEIGHT), data=memoryview(bytes(384))[::2]), "C-contiguous"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(tmp_path: Path, bad: Piece, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        write(tmp_path, [bad])
    assert store.list_root(tmp_path) == []


def test_a_box_saved_twice_or_a_tensor_with_two_shapes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="saved twice"):
        write(tmp_path, [piece("w", WEIGHT), piece("w", WEIGHT)])
    with pytest.raises(CheckpointError, match="disagree"):
        write(tmp_path, [piece("w", WEIGHT, rows(0, 2)), replace(piece("w", WEIGHT, rows(1, 2)), shape=(9, 6))])


def test_an_integer_key_is_refused_because_json_would_change_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the state\['extra'\]\['scheduler'\] to save has the key 30"):
        write(tmp_path, [], {"extra": {"scheduler": {30: 1}}})
    with pytest.raises(CheckpointError, match="not JSON-able"):
        write(tmp_path, [], {"extra": {"scheduler": object()}})


# ---------------------------------------------------------------- writing again, and other writers


def test_the_same_part_again_changes_nothing(tmp_path: Path) -> None:
    first = write_rank(tmp_path, 0)
    stat = (tmp_path / first.part).stat()
    second = write_rank(tmp_path, 0)
    assert (second.digest, second.part, second.size_bytes) == (first.digest, first.part, first.size_bytes)
    assert (tmp_path / first.part).stat().st_ino == stat.st_ino
    done = commit(tmp_path, [first, write_rank(tmp_path, 1)])
    write_rank(tmp_path, 0)  # after the commit as well
    assert verify(tmp_path, done.path).tensors == 4


def test_an_uncommitted_part_gives_way_to_other_contents(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, world_size=4)  # what a crashed run of the same generation left
    done = save(tmp_path, world_size=2)
    assert verify(tmp_path, done.path).tensors == 4


def test_a_committed_part_does_not(tmp_path: Path) -> None:
    done = save(tmp_path)
    with pytest.raises(Refused, match="committed already with other contents"):
        write_rank(tmp_path, 0, world_size=4)
    assert verify(tmp_path, done.path).tensors == 4


def test_a_reported_part_that_was_replaced_is_not_committed(tmp_path: Path) -> None:
    parts = write_all(tmp_path)
    write_rank(tmp_path, 0, sign=-1)
    with pytest.raises(CheckpointError, match=r"part-00000\.json"):
        commit(tmp_path, parts)
    assert store.committed(tmp_path) == []


def test_an_older_generation_cannot_write(tmp_path: Path) -> None:
    store.fence(tmp_path, 4)
    with pytest.raises(Refused, match="generation 3 may not write"):
        write_rank(tmp_path, 0, generation=3)
    assert store.list_root(tmp_path) == []
    write_rank(tmp_path, 0, generation=4)


def test_a_disk_that_fills_up_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.fence(tmp_path, 1)
    monkeypatch.setattr(native.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_rank(tmp_path, 0)
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if "part" in path.name] == []


def test_a_directory_that_is_removed_meanwhile_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def removed(path: Path, *_: object) -> list[str]:
        path.parent.rename(tmp_path / "gone")
        return []

    monkeypatch.setattr(native, "_write_data", removed)
    with pytest.raises(CheckpointError, match="was not written"):
        write(tmp_path, [])


def test_a_lock_held_for_ever_is_an_error_not_a_hang(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(CheckpointError, match="locked by another process"),
        locked(tmp_path, shared=True, patience_s=0.05),
    ):
        pass
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True, patience_s=0.0):
        pass
