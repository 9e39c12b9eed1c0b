"""Hugging Face's own library writes what regrow reads and reads what regrow writes, bit for bit."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from orchestrator.checkpoint.convert import Conversion, convert
from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.stream import Limits

pytestmark = pytest.mark.timeout(300)

LIMITS = Limits(1 << 20, 2)
SMALL: dict[str, int] = {"vocab_size": 48, "max_position_embeddings": 32}
LLAMA = SMALL | {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def _model(kind: str) -> Any:
    torch.manual_seed(7)
    match kind:
        case "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
        case "llama, tied":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
        case "mixtral":
            config = transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)
            return transformers.MixtralForCausalLM(config)
        case _:
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=48, n_positions=32, n_embd=16,
                                                                        n_layer=2, n_head=4))  # fmt: skip


def trained(kind: str, dtype: torch.dtype) -> tuple[Any, torch.optim.Optimizer]:
    """A model after two steps of AdamW."""
    model = _model(kind).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.arange(24).reshape(2, 12)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def loaded(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The state that `from_pretrained` makes of a folder; nothing is missing in it and nothing left over."""
    model.config.save_pretrained(folder)
    found, told = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    return dict(found.state_dict())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """What lies in the safetensors files of a folder, read by their own library."""
    from safetensors.torch import load_file

    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


KINDS = ["llama", "llama, tied", "gpt2", "mixtral"]


@pytest.mark.parametrize("shard", ["5KB", "1GB"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saved_is_read(tmp_path: Path, kind: str, shard: str) -> None:
    model, _ = trained(kind, torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size=shard)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (shard == "5KB")
    view = open_checkpoint(tmp_path / "model")
    there = saved(tmp_path / "model")
    assert set(view.tensors) == set(there)
    for name, tensor in there.items():
        out = np.empty(view.tensors[name].size_bytes, np.uint8)
        view.read(name, Box.whole(tuple(tensor.shape)), out)
        assert view.tensors[name].shape == tuple(tensor.shape)
        assert out.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize("to", ["huggingface", "universal"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_loads_what_a_training_run_is_converted_to(
    tmp_path: Path, kind: str, to: str, dtype: torch.dtype
) -> None:
    """From PyTorch's distributed checkpoint, weights and optimizer, to a folder that `from_pretrained` takes."""
    model, optimizer = trained(kind, dtype)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    convert(tmp_path / "dcp", tmp_path / "out", Conversion(to, limits=LIMITS))
    assert_same(loaded(model, tmp_path / "out"), model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_through_every_target(tmp_path: Path, kind: str) -> None:
    """Saved by transformers -> universal -> native -> PyTorch's own -> Hugging Face -> loaded by transformers."""
    model, _ = trained(kind, torch.float32)
    model.save_pretrained(tmp_path / "model", max_shard_size="5KB")
    source = tmp_path / "model"
    for to in ("universal", "native", "dcp", "huggingface"):
        convert(source, tmp_path / to, Conversion(to, ranks=3 if to == "native" else None, limits=LIMITS))
        source = tmp_path / to
    assert saved(source).keys() == saved(tmp_path / "model").keys()
    assert_same(loaded(model, source), model.state_dict())


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    """The comparison above sees one flipped bit."""
    model, _ = trained("llama", torch.float32)
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(AssertionError):
        assert_same(loaded(model, tmp_path / "other"), model.state_dict())
