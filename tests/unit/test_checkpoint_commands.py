"""What `regrow checkpoint` prints of a stranger's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from orchestrator.cli import main
from tests.unit.checkpoint.formats.test_deepspeed_stages import save as save_pipeline

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


def test_verify_tells_of_copies_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    embed, again, layer = nn.Embedding(5, 3), nn.Embedding(5, 3), nn.Linear(3, 3)
    again.load_state_dict(embed.state_dict())
    save_pipeline(tmp_path, [[embed, layer], [again]], {0: embed, 1: layer, 2: again})
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert "note:" not in capsys.readouterr().out
    file = tmp_path / "step" / "mp_rank_01_model_states.pt"
    content = torch.load(file, weights_only=False)
    content["optimizer"]["state"][0]["exp_avg"] += 1
    torch.save(content, file)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    expected = "note: the 2 copies of 0.weight.exp_avg differ in 15 elements by at most 1: the first is used"
    assert expected in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["copies_that_differ"]) == 1
