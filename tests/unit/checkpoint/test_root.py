"""Checkpoint locations: what is accepted, and one clear sentence for what is not."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import root as root_module
from orchestrator.checkpoint import store
from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.root import checkpoint_directory, create_root, list_root, parse_root, require_space
from orchestrator.checkpoint.verify import verify
from orchestrator.core.errors import CheckpointError, InvalidInput, RegrowError
from tests.unit.checkpoint.saving import save, write_rank


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///ckpt/gpt", "/ckpt/gpt"),
        ("file://localhost/ckpt", "/ckpt"),
        ("file:///with%20space", "/with space"),
        ("/ckpt/gpt", "/ckpt/gpt"),
        ("ckpt", "ckpt"),
        (Path("/ckpt"), "/ckpt"),
    ],
)
def test_locations(uri: str | Path, path: str) -> None:
    assert parse_root(uri) == Path(path)


@pytest.mark.parametrize("uri", ["s3://bucket/x", "gs://b", "file://other-host/ckpt", "file:relative", "", " ", "a\0b"])
def test_other_locations_are_one_sentence(uri: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        parse_root(uri)
    assert repr(uri) in str(raised.value)
    assert "give a directory" in str(raised.value) or "give file:///" in str(raised.value)
    assert "\n" not in str(raised.value)


ENTRIES: list[Callable[[Any], object]] = [
    store.committed,
    store.latest,
    store.newest_generation,
    lambda root: store.fence(root, 1),
    lambda root: store.prune(root, 1, (), 1),
    lambda root: write_rank(root, 0),
    lambda root: native.open_view(root, "step-00000040-gen-0003"),
    lambda root: verify(root, "step-00000040-gen-0003"),
    lambda root: store.commit(root, generation=1, step=1, world_size=0, parts=[]),
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("where", ["a file", "below a file", "below nothing"])
def test_every_entry_names_an_unusable_directory(tmp_path: Path, entry: Callable[[Any], object], where: str) -> None:
    (tmp_path / "file").write_text("")
    root = {"a file": "file", "below a file": "file/root", "below nothing": "none/root"}[where]
    with pytest.raises(CheckpointError) as raised:
        entry(tmp_path / root)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_another_scheme(entry: Callable[[Any], object]) -> None:
    with pytest.raises(RegrowError, match=r"s3|one of each"):
        entry("s3://bucket/ckpt")


def test_the_root_is_made_by_its_first_writer_and_missing_for_readers(tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    assert store.committed(root) == []
    assert store.latest(root) is None
    assert store.newest_generation(root) == 0
    assert store.prune(root, 3) == []
    assert not root.exists()
    assert create_root(root.as_uri()) == root
    assert root.is_dir()


def test_an_unwritable_root_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root_module.os, "access", lambda *_: False)  # tests run as root, whom no mode bit stops
    with pytest.raises(CheckpointError, match="cannot be read and written: give one that can"):
        create_root(tmp_path)


def test_only_checkpoint_directories_are_listed(tmp_path: Path) -> None:
    done = save(tmp_path)
    for other in ["step-40-gen-3", "step-00000040-gen-3", "step-00000040-gen-0003.bak", ".removed-x", "notes"]:
        (tmp_path / other).mkdir()
    assert list_root(tmp_path) == [(40, 3, done.path)]


@pytest.mark.parametrize("path", ["../other", "", ".", "step-00000040-gen-0003/..", "/etc", "step-00000040-gen-3"])
def test_names_cannot_leave_the_root(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidInput, match="not the name of a checkpoint"):
        checkpoint_directory(tmp_path, path)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "f_bavail f_frsize")
    monkeypatch.setattr(root_module.os, "statvfs", lambda _: usage(10, 4096))
    require_space(tmp_path, 40960)
    with pytest.raises(CheckpointError, match="has 40960 bytes free but 40961 are needed: make room"):
        require_space(tmp_path, 40961)
    with pytest.raises(CheckpointError, match="make room"):
        write_rank(tmp_path, 0)
    assert list_root(tmp_path) == []
