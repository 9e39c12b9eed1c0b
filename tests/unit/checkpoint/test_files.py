"""What lies in a stranger's folder beside files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.checkpoint.fields import MAX_DEPTH, parse_object
from orchestrator.checkpoint.files import LocalFiles, read_whole
from orchestrator.checkpoint.parts import load_manifest
from orchestrator.core.errors import CorruptCheckpoint


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors is corrupt: it is not a regular file"):
        LocalFiles(tmp_path).size("model.safetensors")


def test_a_device_is_not_read_for_ever(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001-gen-0001"
    folder.mkdir()
    (folder / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(CorruptCheckpoint, match="not a regular file"):
        read_whole(LocalFiles(folder), "manifest.json")
    with pytest.raises(CorruptCheckpoint, match="not a regular file"):
        load_manifest(LocalFiles(folder))


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    """As Hugging Face's cache has them."""
    (tmp_path / "blob").write_bytes(b"{}")
    (tmp_path / "config.json").symlink_to("blob")
    assert read_whole(LocalFiles(tmp_path), "config.json") == b"{}"


def test_deep_json_is_refused_before_anything_walks_it() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    parse_object(nested(MAX_DEPTH), "x.json")
    with pytest.raises(CorruptCheckpoint, match=f"nested more than {MAX_DEPTH} deep"):
        parse_object(nested(MAX_DEPTH + 1), "x.json")
