"""The garbage collector is back after reading, whatever happened."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.heap import uncollected
from orchestrator.core.errors import CheckpointError


def test_nothing_is_collected_within() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_is_back_after_an_error(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x02K")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    assert gc.isenabled()


def test_one_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
