"""The example's model, data and schedule; that it trains as a plain script and under torchrun."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import jobfile

FOLDER = Path(__file__).parents[3] / "deploy" / "examples" / "gpt"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's `train` module, with `data`, `model` and `parallel` beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("train")
    for name in ("train", "data", "model", "parallel"):
        sys.modules.pop(name, None)


def test_a_stage_has_the_names_and_initial_weights_of_the_whole_model(example: Any) -> None:
    model = sys.modules["model"]
    config = model.Config()
    whole = model.GPT(config)
    model.initialise(whole, config, seed=0)
    expected = dict(whole.named_parameters())
    found = {}
    for chosen in (range(1), range(1, 3), range(3, 4)):
        stage = model.GPT(config, chosen)
        model.initialise(stage, config, seed=0)
        found |= dict(stage.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model.initialise(whole, config, seed=1)
    assert not torch.equal(found["head.weight"], whole.head.weight)


def test_stages_chained_compute_what_the_whole_model_computes(example: Any) -> None:
    model = sys.modules["model"]
    config = model.Config(seq_length=8)
    stages = [model.GPT(config, chosen) for chosen in (range(2), range(2, 4), range(4))]
    for stage in stages:
        model.initialise(stage, config, seed=0)
    tokens = torch.arange(16).reshape(2, 8)
    first, second, whole = stages
    torch.testing.assert_close(second(first(tokens)), whole(tokens))
    torch.testing.assert_close(whole(tokens).exp().sum(-1), torch.ones(2, 8))


def test_the_model_does_not_look_ahead(example: Any) -> None:
    model = sys.modules["model"]
    config = model.Config(seq_length=8)
    whole = model.GPT(config)
    model.initialise(whole, config, seed=0)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    changed = tokens.clone()
    changed[0, 5] = 9
    before, after = whole(tokens), whole(changed)
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.equal(before[0, 5:], after[0, 5:])


def test_the_text_is_real_the_same_every_time_and_cut_into_shifted_windows(example: Any) -> None:
    data = sys.modules["data"]
    text = data.read_sources()
    assert len(text) == data.LIMIT_BYTES
    assert text == data.read_sources()
    assert b"def " in text and b"import " in text
    dataset = data.Text(b"abcdefgh", 3)
    assert len(dataset) == 2
    inputs, targets = dataset[1]
    assert bytes(inputs.tolist()) == b"def" and bytes(targets.tolist()) == b"efg"


def test_the_learning_rate_warms_up_and_decays_to_a_tenth(example: Any) -> None:
    rates = [example.learning_rate(step, 10, 120) for step in range(121)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[120] == pytest.approx(0.1)


def test_padded_targets_cost_nothing(example: Any) -> None:
    log_probabilities = torch.randn(2, 3, 5).log_softmax(-1)
    targets = torch.tensor([[1, 2, 3], [-100, -100, -100]])
    losses = example.sample_losses(log_probabilities, targets)
    assert losses[0] == pytest.approx(-log_probabilities[0, [0, 1, 2], [1, 2, 3]].mean().item())
    assert losses[1] == 0.0


def test_the_job_file_describes_the_model_that_the_script_builds(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = jobfile.load(FOLDER / "job.yaml")
    monkeypatch.setattr(sys, "argv", ["train.py", *spec.entrypoint.args])
    arguments = vars(example.arguments())
    assert spec.model is not None
    names = list(vars(sys.modules["model"].Config()))
    assert {name: getattr(spec.model, name) for name in names} == {name: arguments[name] for name in names}


SCRIPT = [str(FOLDER / "train.py"), "--steps=3", "--layers=1", "--seq-length=8"]


@pytest.mark.parametrize(
    "command",
    [SCRIPT, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *SCRIPT]],
    ids=["python", "torchrun"],
)
def test_it_trains_without_an_orchestrator(command: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REGROW_ORDER")}
    environment |= {"REGROW_LEDGER": str(tmp_path), "OMP_NUM_THREADS": "1", "REGROW_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    ranks = 2 if "torch.distributed.run" in command else 1
    assert len(list(tmp_path.glob("gen-0000-rank-*.jsonl"))) == ranks


@pytest.mark.parametrize("what", ["selective", "full"])
def test_recomputation_keeps_less_and_gives_the_same_gradients(example: Any, what: str) -> None:
    model = sys.modules["model"]
    config = model.Config(seq_length=8)
    tokens = torch.arange(16).reshape(2, 8)
    gradients, kept = [], []
    for choice in ("none", what):
        one = model.GPT(config)
        model.initialise(one, config, seed=0)
        one.recompute(choice)
        kept.append(0)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = one(tokens)[..., 3].sum()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in one.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < 0.9 * kept[0]
