"""The data itself: made by real runs, complete, finite, and the same training whatever the sharding."""

from __future__ import annotations

import pytest
import torch

from tests.peers import data
from tests.peers.cases import RUNS, launches

pytestmark = [pytest.mark.peer, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("launch", launches())
def test_every_run_left_a_checkpoint_and_its_live_state(launch: str) -> None:
    for run in launches()[launch]:
        made = data.checkpoint(run.name)
        assert list(made.directory.glob("*model_states.pt")), run.name
        assert bool(list(made.directory.glob("*optim_states.pt"))) == (run.stage > 0), run.name
        live, known = made.live(), made.known()
        names = [name for group in known["groups"] for name in group["names"]]
        assert names
        assert len(known["groups"]) == run.groups
        assert {key.removeprefix("master/") for key in live if key.startswith("master/")} == set(names), run.name
        assert {key.removeprefix("weight/") for key in live if key.startswith("weight/")} == set(names), run.name
        assert any(key.startswith("frozen/") for key in live) == run.frozen
        assert any(key.startswith("buffer/") for key in live) == run.buffers
        assert all(bool(torch.isfinite(tensor).all()) for tensor in live.values()), run.name
        if run.optimizer == "adamw":
            assert {key for key in live if key.startswith("state/")} == {
                f"state/{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names
            }, run.name
            # Without ZeRO, half precision begins with a step of zero gradients to make the states.
            first = int(known["optimizer"] == "FP16_UnfusedOptimizer")
            assert set(known["scalars"]["step"].values()) == {run.steps + first - known["skipped_steps"]}, run.name


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sharding_does_not_change_what_was_trained(world: int) -> None:
    """The gatherings of live state are held to each other: three stages, three ways to gather."""
    reference = data.checkpoint(f"z0-fp32-w{world}").live()
    for stage in (1, 2, 3):
        live = data.checkpoint(f"z{stage}-fp32-w{world}").live()
        assert live.keys() == reference.keys()
        for key, tensor in live.items():
            torch.testing.assert_close(tensor, reference[key], rtol=1e-3, atol=1e-4, msg=f"z{stage}: {key}")


CONVERTS_WRONG = ("w2-roundrobin", "w3-roundrobin", "w4-roundrobin")
"""DeepSpeed writes the mapping of the plain order, unless a parameter was padded to an alignment."""
CONVERTER_CRASHES = ("sgd", "rmsprop", "adagrad", "elastic", "master-groups")


@pytest.mark.parametrize("launch", launches())
def test_deepspeeds_own_converter_agrees_with_the_live_state_where_it_is_known_to_work(launch: str) -> None:
    """Two independent ways to the same tensors; where they part, it is known why."""
    for run in launches()[launch]:
        made = data.checkpoint(run.name)
        if run.stage == 0:
            assert "optim_states" in made.conversion_error
        elif any(word in run.name for word in CONVERTS_WRONG):
            assert made.conversion_wrong, run.name
        elif not any(word in run.name for word in CONVERTER_CRASHES):
            assert not made.conversion_error, run.name
            assert not made.conversion_wrong, run.name


def test_deepspeed_goes_on_alike_at_every_world_size() -> None:
    for name in ("z1-fp32-w4", "z3-fp32-w4"):
        root = data.checkpoint(name).home / "universal"
        assert data.resume(name, root, 2) == pytest.approx(data.resume(name, root, 3), rel=1e-4)


def test_names_say_what_was_run() -> None:
    for name, run in RUNS.items():
        assert name == run.name
        assert run.dtype in name
