"""PyTorch distributed checkpoints from real ranks on every kind of mesh: read bit for bit, and loaded on others."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.formats import Reading, dcp, native
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.view import UniversalView
from tests.integration.checkpoint import dcp_cases

DEADLINE_S = 200.0
pytestmark = pytest.mark.timeout(900)  # seconds on an idle machine; the ranks of a world wait for one another
CASES: dict[str, dict[str, Any]] = {
    "one rank, tied": {"world": 1, "mesh": "dp", "tied": True, "to": 3, "into": "dp"},
    "dp 2, bf16, tied, groups": {
        "world": 2, "mesh": "dp", "bf16": True, "tied": True, "groups": True, "to": 4, "into": "hsdp"
    },
    "tp 2": {"world": 2, "mesh": "tp", "to": 4, "into": "dp x tp"},
    "dp 3, groups, flattened": {"world": 3, "mesh": "dp", "groups": True, "flattened": True, "to": 2, "into": "dp"},
    "dp 3 to pp": {"world": 3, "mesh": "dp", "stages": True, "to": 4, "into": "pp"},
    "hsdp 2 x 2, groups": {"world": 4, "mesh": "hsdp", "groups": True, "to": 3, "into": "dp"},
    "dp 2 x tp 2": {"world": 4, "mesh": "dp x tp", "to": 2, "into": "tp"},
    "pp 2 x dp 2": {"world": 4, "mesh": "pp", "stages": True, "to": 2, "into": "dp"},
}  # fmt: skip
"""What is trained and saved at which world size, and the world and mesh that it is loaded into."""


class Ranks:
    """Starts the ranks of a world as forks of one process that has torch."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([dcp_cases.__name__])
        self.launched = 0

    def run(self, world: int, jobs: list[tuple[str, dict[str, Any], str]]) -> None:
        self.launched += 1
        store, errors = self.directory / f"store{self.launched}", self.directory / f"errors{self.launched}"
        ranks = [
            self.context.Process(target=dcp_cases.rank_main, args=(rank, world, str(store), jobs, str(errors)))
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(DEADLINE_S)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        told = "".join(path.read_text() for path in sorted(self.directory.glob(f"{errors.name}.*")))
        assert codes == [0] * world, told


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases saved, consolidated by torch, and loaded on the other mesh: one launch per world and direction."""
    root = tmp_path_factory.mktemp("meshes")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        ranks = Ranks(root)
        for world in sorted({case["world"] for case in CASES.values()}):
            jobs = [("save", case, str(root / name)) for name, case in CASES.items() if case["world"] == world]
            ranks.run(world, jobs)
        for name in CASES:
            dcp_to_torch_save(root / name / "dcp", root / name / "whole.pt")
        for world in sorted({case["to"] for case in CASES.values()}):
            jobs = [("load", case, str(root / name)) for name, case in CASES.items() if case["to"] == world]
            ranks.run(world, jobs)
    return root


def whole(view: UniversalView, name: str, like: torch.Tensor) -> torch.Tensor:
    tensor = view.tensors[name]
    assert tensor.shape == tuple(like.shape), name
    out = np.empty(tensor.size_bytes, np.uint8)
    view.read(name, Box.whole(tensor.shape), out)
    return torch.frombuffer(bytearray(out), dtype=like.dtype).reshape(like.shape)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("format", ["dcp", "native"])
def test_universal_tensors_are_those_of_torchs_own_consolidation(saved: Path, name: str, format: str) -> None:
    case = CASES[name]
    module = dcp if format == "dcp" else native
    view = module.open_files(LocalFiles(saved / name / format), Reading())
    expected = torch.load(saved / name / "whole.pt", weights_only=False)["app"]
    weights, names = expected["model"], set()
    for key, value in weights.items():
        names.add(key)
        assert torch.equal(whole(view, key, value), value), key
        assert view.tensors[key].kind == ("parameter" if value.is_floating_point() else "buffer")
    for key, value in states(expected["optim"], weights).items():
        names.add(key)
        assert torch.equal(whole(view, key, value), value), key
        assert view.tensors[key].kind == "state"
    assert view.tensors.keys() == names
    assert view.step == dcp_cases.STEPS
    assert view.state["scheduler"] == {"last_epoch": dcp_cases.STEPS, "rates": [0.1, 0.2]}
    trained = {tensor.parameter for tensor in view.tensors.values() if tensor.state is not None}
    listed = [name for group in view.state["param_groups"] for name in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == trained
    check_groups(view.state["param_groups"], grouped=bool(case.get("groups")))
    if format == "dcp" and not case.get("stages"):
        assert view.frozen == weights.keys() - trained and "frozen" in view.frozen


def states(optim: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Universal name -> tensor, of either form of an optimizer's state dict."""
    if "state" in optim:
        return {f"{key}.{state}": value for key, own in optim["state"].items() for state, value in own.items()}
    return {key.removeprefix("state."): value for key, value in optim.items() if key.startswith("state.")}


def check_groups(groups: list[dict[str, Any]], *, grouped: bool) -> None:
    if not grouped:
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.01)]
        return
    found = {(group["lr"], group["weight_decay"]): group["params"] for group in groups}
    assert found.keys() == {(0.01, 0.1), (0.005, 0.0)}
    assert "blocks.0.scale" in found[0.005, 0.0] and "blocks.0.up.weight" in found[0.01, 0.1]
