"""What `regrow checkpoint` prints of a stranger's checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from orchestrator.cli import main

NAMES = ("blocks[0].weight", "[/red]", "[link=http://example.com]x", "\x1b[2Jclear", "two\nlines")


def test_names_are_shown_as_they_are_and_move_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({name: np.ones(2, "f4") for name in NAMES}, tmp_path / "model.safetensors")
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for name in ("blocks[0].weight", "[/red]", "[link=http://exam", r"\x1b[2Jclear", r"two\nlines"):
        assert name in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("to", ["universal", "huggingface", "dcp", "deepspeed-universal", "native"])
@pytest.mark.parametrize("name", ["../x", "/tmp/regrow-escaped", "a/../../b", "", ".", "..", "nul\0l", "x" * 300])
def test_tensors_with_names_like_paths_stay_inside_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, name: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({name: np.ones(2, "f4"), "plain": np.ones(2, "f4")}, source / "model.safetensors")
    (tmp_path / "inside").mkdir()
    code = main(["checkpoint", "convert", str(source), str(tmp_path / "inside" / "made"), "--to", to])
    assert code in (0, 2, 3), capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "source"]
    assert {path.name for path in (tmp_path / "inside").iterdir()} <= {"made", ".made.partial"}
    assert not Path("/tmp/regrow-escaped").exists()
