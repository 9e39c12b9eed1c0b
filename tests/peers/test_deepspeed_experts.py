"""Mixture-of-experts layers, and pipelines without ZeRO, that real DeepSpeed saved: bit for bit the live state."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.checkpoint.formats import open_checkpoint
from tests.peers import environment
from tests.peers.test_deepspeed_source import tensor_of

pytestmark = [pytest.mark.peer, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_s_part_is_named_and_in_its_place(tmp_path: Path, world: int) -> None:
    home = environment.deepspeed()
    command = [str(home / "bin" / "python"), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(world), "--module", "tests.peers.deepspeed_experts", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=environment.REPOSITORY,
        env=environment.variables(home),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = sorted(tmp_path.iterdir())
    assert len(made) == 12
    for case in made:
        live = load_file(case / "live.safetensors")
        view = open_checkpoint(case / "checkpoint")
        assert set(view.tensors) == set(live), case.name
        for name, tensor in live.items():
            assert torch.equal(tensor_of(view, name), tensor), (case.name, name)
        trained = {name for group in view.state["param_groups"] for name in group["params"]}
        assert trained == {name for name, one in view.tensors.items() if one.kind == "parameter"}, case.name
        assert not view.frozen, case.name
