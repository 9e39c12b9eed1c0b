"""Conversions: the same bytes in another format, in bounded memory, and never a target that only looks complete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from orchestrator.checkpoint import target as targets
from orchestrator.checkpoint.convert import Conversion, convert
from orchestrator.checkpoint.difference import compare
from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.native_target import write_native
from orchestrator.checkpoint.formats.universal import write_universal
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.stream import Limits, bands
from orchestrator.checkpoint.verify import verify_any
from orchestrator.core.errors import CheckpointError, Conflict, CorruptCheckpoint, InvalidInput
from tests.unit.checkpoint.samples import ARRAYS, GROUPS, contents, sample

SMALL = Limits(memory_bytes=64 << 10, workers=2)


def ignore(count: int) -> None:
    """Nobody looks."""


@given(st.lists(st.integers(1, 6), max_size=4), st.integers(1, 50))
def test_bands_hold_every_element_once_and_in_order(sizes: list[int], most: int) -> None:
    whole = np.arange(int(np.prod(sizes, dtype=int))).reshape(sizes)
    parts = list(bands(Box.whole(tuple(sizes)), most))
    assert all(part.elements <= most for part in parts)
    assert (
        np.concatenate([whole[(*part.slices, ...)].reshape(-1) for part in parts]).tolist()
        == whole.reshape(-1).tolist()
    )


def test_the_universal_form_holds_all_that_the_view_does(tmp_path: Path) -> None:
    view = sample(tmp_path / "source")
    write_universal(view, tmp_path / "out", limits=SMALL, progress=ignore)
    found = open_checkpoint(tmp_path / "out")
    assert contents(found) == contents(view)
    assert list(found.tensors) != []
    for name, tensor in view.tensors.items():
        other = found.tensors[name]
        assert (tensor.parameter, tensor.state, tensor.kind, tensor.dtype, tensor.shape) == (
            (other.parameter, other.state, other.kind, other.dtype, other.shape)
        )
    assert (found.step, found.aliases, found.frozen) == (12, {"tied": "embedding"}, {"frozen"})
    assert found.state == view.state
    assert found.training_dtypes == {"layers.0.weight": "BF16"}


def test_what_the_universal_form_looks_like_to_others(tmp_path: Path) -> None:
    write_universal(sample(tmp_path / "source"), tmp_path / "out", limits=SMALL, progress=ignore)
    model = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert sorted(model) == ["counter", "embedding", "frozen", "layers.0.weight", "nothing"]
    for name in model:
        assert np.array_equal(model[name], ARRAYS[name])
    states = load_file(tmp_path / "out" / "optimizer-00001-of-00001.safetensors")
    assert sorted(states) == ["layers.0.weight.exp_avg", "layers.0.weight.exp_avg_sq", "layers.0.weight.step"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model)
    described = json.loads((tmp_path / "out" / "universal.json").read_text())
    assert described["parameters"]["layers.0.weight"] == {
        "shape": [37, 11],
        "dtype": "BF16",
        "step": 12.0,
        "states": ["exp_avg", "exp_avg_sq", "step"],
    }
    assert described["param_groups"] == GROUPS
    assert described["frozen"] == ["frozen"]


def test_large_checkpoints_are_divided_into_files(tmp_path: Path) -> None:
    view = sample(tmp_path / "source")
    write_universal(view, tmp_path / "out", limits=SMALL, progress=ignore, shard_bytes=1700)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 2
    assert contents(open_checkpoint(tmp_path / "out")) == contents(view)


@pytest.mark.parametrize("ranks", [1, 3, 40])
def test_native_for_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    view = sample(tmp_path / "source")
    where = write_native(view, tmp_path / "native", ranks=ranks, limits=SMALL, progress=ignore)
    assert where.name == "step-00000012-gen-0001"
    found = open_checkpoint(tmp_path / "native")
    assert (found.source, found.step, contents(found)) == ("native", 12, contents(view))
    assert found.state == view.state
    assert verify_any(tmp_path / "native").tensors == len(view.tensors)
    with pytest.raises(Conflict, match="exists already"):
        write_native(view, tmp_path / "native", ranks=ranks, limits=SMALL, progress=ignore)


def test_hugging_face_weights(tmp_path: Path) -> None:
    view = sample(tmp_path / "source", {name: ARRAYS[name] for name in ("layers.0.weight", "frozen", "counter")})
    write_huggingface(view, tmp_path / "out", limits=SMALL, progress=ignore)
    found = open_checkpoint(tmp_path / "out")
    assert {name: one.dtype for name, one in found.tensors.items()} == {
        "layers.0.weight": "BF16",
        "frozen": "F32",
        "counter": "I64",
    }
    import torch
    from safetensors.torch import load_file as load

    expected = torch.from_numpy(ARRAYS["layers.0.weight"]).bfloat16()
    assert torch.equal(load(tmp_path / "out" / "model.safetensors")["layers.0.weight"], expected)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_rounding_is_torch_s(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file as load

    values = np.array([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, -1e-40, 65519.9, np.inf, -np.inf, np.nan, 1e-8], "f4")
    view = sample(tmp_path / "source", {"frozen": values})
    write_huggingface(view, tmp_path / "out", limits=SMALL, progress=ignore, dtype=dtype)
    found = load(tmp_path / "out" / "model.safetensors")["frozen"]
    expected = torch.from_numpy(values).to({"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[dtype])
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_conversions_there_and_back_change_nothing(tmp_path: Path) -> None:
    write_universal(sample(tmp_path / "source"), tmp_path / "a", limits=SMALL, progress=ignore)
    convert(tmp_path / "a", tmp_path / "n", Conversion("native", ranks=2, limits=SMALL))
    convert(tmp_path / "n", tmp_path / "b", Conversion(limits=SMALL))
    first, second = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    assert compare(first, second, limits=SMALL, progress=ignore).described != ()  # aliases are not kept by native
    assert contents(first) == contents(second)


class Stopped(Exception):
    """Raised by a test in the midst of a conversion."""


def stop_after(count: int) -> Any:
    left, lock = [count], threading.Lock()

    def progress(_: int) -> None:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped

    return progress


def test_a_conversion_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = sample(tmp_path / "source")
    one = Limits(memory_bytes=64 << 10, workers=1)
    with pytest.raises(Stopped):
        write_universal(view, tmp_path / "out", limits=one, progress=stop_after(4))
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "out")
    resumed = []
    original = targets.Partial._resume
    monkeypatch.setattr(
        targets.Partial, "_resume", lambda self, *args: resumed.append(original(self, *args)) or resumed[-1]
    )
    write_universal(view, tmp_path / "out", limits=one, progress=ignore)
    assert len(resumed[0]) >= 3
    assert contents(open_checkpoint(tmp_path / "out")) == contents(view)
    assert verify_any(tmp_path / "out").unproven == 0
    assert not list(tmp_path.glob(".out*"))


def test_what_an_earlier_attempt_left_is_not_trusted(tmp_path: Path) -> None:
    """Neither bytes that changed since, nor the work for another source."""
    view = sample(tmp_path / "source")
    one = Limits(memory_bytes=64 << 10, workers=1)
    with pytest.raises(Stopped):
        write_universal(view, tmp_path / "out", limits=one, progress=stop_after(6))
    for file in (tmp_path / ".out.partial").glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    write_universal(view, tmp_path / "out", limits=one, progress=ignore)
    assert contents(open_checkpoint(tmp_path / "out")) == contents(view)

    with pytest.raises(Stopped):
        write_universal(view, tmp_path / "again", limits=one, progress=stop_after(6))
    changed = sample(tmp_path / "source", {name: array + array.dtype.type(1) for name, array in ARRAYS.items()})
    write_universal(changed, tmp_path / "again", limits=one, progress=ignore)
    assert contents(open_checkpoint(tmp_path / "again")) == contents(changed)


KILLED = """
import sys
from pathlib import Path
from orchestrator.checkpoint.formats.universal import write_universal
from orchestrator.checkpoint.stream import Limits
from tests.unit.checkpoint.samples import sample

def progress(count):
    print(count, flush=True)
    sys.stdin.readline()

write_universal(sample(Path(sys.argv[1])), Path(sys.argv[2]), limits=Limits(64 << 10, 1), progress=progress)
"""


@pytest.mark.parametrize("blocks", [1, 5])
def test_a_killed_conversion_leaves_no_target(tmp_path: Path, blocks: int) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "source"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        for _ in range(blocks):
            assert process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    view = open_checkpoint_of_sample(tmp_path)
    write_universal(view, tmp_path / "out", limits=SMALL, progress=ignore)
    assert contents(open_checkpoint(tmp_path / "out")) == contents(view)


def open_checkpoint_of_sample(tmp_path: Path) -> Any:
    """The killed process's source, unchanged."""
    raw = tmp_path / "source" / "raw"
    before = raw.stat()
    view = sample(tmp_path / "source")
    os.utime(raw, ns=(before.st_atime_ns, before.st_mtime_ns))
    return view


def test_a_target_that_exists_or_is_being_made(tmp_path: Path) -> None:
    view = sample(tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(Conflict, match=r"out exists already: give a folder that does not exist"):
        write_universal(view, tmp_path / "out", limits=SMALL, progress=ignore)
    with targets.partial(tmp_path / "other"), pytest.raises(Conflict, match="being written by another process"):
        write_universal(view, tmp_path / "other", limits=SMALL, progress=ignore)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be made"):
        write_universal(view, tmp_path / "file" / "other", limits=SMALL, progress=ignore)
    write_universal(view, tmp_path / "new" / "other", limits=SMALL, progress=ignore)
    assert verify_any(tmp_path / "new" / "other").tensors == len(view.tensors)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = sample(tmp_path / "source")
    monkeypatch.setattr(targets, "ROOM_BYTES", 1 << 62)
    with pytest.raises(CheckpointError, match=r"bytes free but .* are needed: make room"):
        write_universal(view, tmp_path / "out", limits=SMALL, progress=ignore)
    assert not (tmp_path / "out").exists()


def test_a_source_that_lacks_elements_makes_no_target(tmp_path: Path) -> None:
    write_universal(sample(tmp_path / "source"), tmp_path / "a", limits=SMALL, progress=ignore)
    os.truncate(tmp_path / "a" / "model-00001-of-00001.safetensors", 100)
    with pytest.raises(CorruptCheckpoint, match="model-00001"):
        convert(tmp_path / "a", tmp_path / "b", Conversion(limits=SMALL))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "conversion", [Conversion("zip"), Conversion("huggingface", dtype="I8"), Conversion("native", ranks=0)]
)
def test_wrong_arguments(tmp_path: Path, conversion: Conversion) -> None:
    write_universal(sample(tmp_path / "source"), tmp_path / "a", limits=SMALL, progress=ignore)
    with pytest.raises(InvalidInput):
        convert(tmp_path / "a", tmp_path / "b", conversion)
    assert not (tmp_path / "b").exists()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_flipped_bit_of_a_universal_checkpoint_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("flip")
    arrays = {name: ARRAYS[name] for name in ("layers.0.weight.step", "frozen", "layers.0.weight", "counter")}
    write_universal(sample(tmp_path / "source", arrays), tmp_path / "a", limits=SMALL, progress=ignore)
    files = [path for path in sorted((tmp_path / "a").iterdir()) if not path.name.endswith("index.json")]
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[place] ^= 1 << bit
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is corrupt|known format"):
        verify_any(tmp_path / "a")


def test_a_universal_checkpoint_without_its_description_is_not_taken_for_bare_weights(tmp_path: Path) -> None:
    write_universal(sample(tmp_path / "source"), tmp_path / "made", limits=Limits(), progress=lambda count: None)
    (tmp_path / "made" / "universal.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"made/universal\.json is corrupt: it is missing"):
        open_checkpoint(tmp_path / "made")
    assert "embedding" in open_checkpoint(tmp_path / "made", source="huggingface").tensors
