"""Checkpoints of Megatron-LM, written from their published description: Megatron needs a GPU to write its own.

Sources (github.com/NVIDIA/Megatron-LM): `megatron/training/checkpointing.py` (folders, `generate_state_dict`),
`megatron/core/optimizer/optimizer.py` (`Float16OptimizerWithFloat16Params.state_dict`, `FP32Optimizer`,
`ChainedOptimizer`), `megatron/core/optimizer/__init__.py` (parameter groups), `megatron/core/optimizer/
distrib_optimizer.py` (`get_parameter_state_dp_zero`), `megatron/core/distributed/param_and_grad_buffer.py` (places in
the buffers), `megatron/core/transformer` and `megatron/legacy/model` (names, shapes and how ranks split them).

The writer shares nothing with the reader: it splits whole tensors as the layers do.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass
class Model:
    """A whole model in Megatron's names, in the order of its parameters, and how it is divided."""

    kind: str = "gpt"
    core: bool = True
    """Names of megatron.core, else those of the models before it."""
    tied: bool = True
    layers: int = 4
    hidden: int = 8
    heads: int = 4
    groups: int = 4
    ffn: int = 12
    experts: int = 0
    vocab: int = 16
    tensors: Tensors = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        for name, shape in self.shapes().items():
            self.tensors[name] = torch.randn(shape, generator=generator)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, glu, bias = self.hidden, self.kind != "gpt", self.kind == "gpt"
        qkv = (self.heads + 2 * self.groups) * (hidden // self.heads)
        found: dict[str, tuple[int, ...]] = {}
        root = "" if self.core else "language_model."
        found[f"{root}embedding.word_embeddings.weight"] = (self.vocab, hidden)
        if self.kind == "gpt":
            found[f"{root}embedding.position_embeddings.weight"] = (6, hidden)
        block = "decoder" if self.core else "language_model.encoder"

        def linear(name: str, rows: int, columns: int, biased: bool = bias) -> None:
            found[f"{name}.weight"] = (rows, columns)
            if biased:
                found[f"{name}.bias"] = (rows,)

        def norm(name: str) -> None:
            found[f"{name}.weight"] = (hidden,)
            if bias:
                found[f"{name}.bias"] = (hidden,)

        for layer in range(self.layers):
            at = f"{block}.layers.{layer}"
            names = (
                ("input_layernorm", "self_attention.linear_proj", "self_attention.linear_qkv", "pre_mlp_layernorm")
                if self.core
                else ("input_norm", "self_attention.dense", "self_attention.query_key_value", "post_attention_norm")
            )
            norm(f"{at}.{names[0]}")
            linear(f"{at}.{names[1]}", hidden, hidden)
            linear(f"{at}.{names[2]}", qkv, hidden)
            norm(f"{at}.{names[3]}")
            up, down = ("linear_fc1", "linear_fc2") if self.core else ("dense_h_to_4h", "dense_4h_to_h")
            if self.experts:
                found[f"{at}.mlp.router.weight"] = (self.experts, hidden)
                for expert in range(self.experts):
                    linear(f"{at}.mlp.experts.local_experts.{expert}.{up}", 2 * self.ffn, hidden)
                    linear(f"{at}.mlp.experts.local_experts.{expert}.{down}", hidden, self.ffn)
            else:
                linear(f"{at}.mlp.{up}", (2 if glu else 1) * self.ffn, hidden)
                linear(f"{at}.mlp.{down}", hidden, self.ffn)
        norm(f"{block}.final_layernorm" if self.core else f"{block}.final_norm")
        if not self.tied:
            found[f"{root}output_layer.weight"] = (self.vocab, hidden)
        return found


def slice_of(model: Model, name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What a tensor-parallel rank holds of a parameter (ColumnParallelLinear, RowParallelLinear, SwiGLU)."""
    owner, _, last = name.rpartition(".")
    module = owner.rpartition(".")[2]
    if module in ("linear_proj", "dense", "linear_fc2", "dense_4h_to_h"):
        return whole.chunk(size, 1)[rank].clone() if last == "weight" else whole
    if module in ("linear_fc1", "dense_h_to_4h") and model.kind != "gpt":
        gate, up = whole.chunk(2, 0)
        return torch.cat([gate.chunk(size, 0)[rank], up.chunk(size, 0)[rank]])
    if module in ("linear_qkv", "query_key_value", "linear_fc1", "dense_h_to_4h", "word_embeddings", "output_layer"):
        return whole.chunk(size, 0)[rank].clone()
    return whole


@dataclass
class Job:
    """How the model was trained and saved."""

    model: Model
    tensor: int = 1
    stages: int = 1
    virtual: int = 1
    expert: int = 1
    dtype: torch.dtype = torch.bfloat16
    optimizer: str = "float16"
    """`float16` (fp32 masters), `fp32`, `distributed`, or none."""
    iteration: int = 100
    apex: bool = True
    """Apex' FusedAdam counts steps in the group, torch's AdamW in the parameter's state."""

    def state(self, name: str, state: str) -> torch.Tensor:
        """A whole state: master, exp_avg or exp_avg_sq."""
        master = self.model.tensors[name]
        return {"master": master, "exp_avg": master * 0.5 - 1, "exp_avg_sq": master**2}[state].float()


def write(job: Job, root: Path) -> Path:
    """Write the checkpoint; returns its folder."""
    folder = root / f"iter_{job.iteration:07d}"
    for stage in range(job.stages):
        for expert in range(job.expert):
            for tensor in range(job.tensor):
                name = f"mp_rank_{tensor:02d}"
                name += f"_{stage:03d}" if job.stages > 1 else ""
                name += f"_{expert:03d}" if job.expert > 1 else ""
                (folder / name).mkdir(parents=True)
                _write_rank(job, folder / name, stage, expert, tensor)
    (root / "latest_checkpointed_iteration.txt").write_text(str(job.iteration))
    return folder


def local_names(job: Job, stage: int, chunk: int, expert: int) -> list[tuple[str, str]]:
    """(name on the rank, name in the whole model) of a model chunk, in the order of its parameters."""
    model = job.model
    each = model.layers // (job.stages * job.virtual)
    first = (chunk * job.stages + stage) * each
    first_chunk, last_chunk = stage == chunk == 0, (stage, chunk) == (job.stages - 1, job.virtual - 1)
    experts = model.experts // job.expert if model.experts else 0
    found = []
    for name in model.tensors:
        local = name
        if ".layers." in name:
            head, rest = name.split(".layers.")
            number, tail = rest.split(".", 1)
            if not first <= int(number) < first + each:
                continue
            local = f"{head}.layers.{int(number) - first}.{tail}"
            if "local_experts." in tail:
                before, after = local.split("local_experts.")
                index, end = after.split(".", 1)
                if not expert * experts <= int(index) < (expert + 1) * experts:
                    continue
                local = f"{before}local_experts.{int(index) - expert * experts}.{end}"
        elif ("embedding" in name and not first_chunk) or ("embedding" not in name and not last_chunk):
            continue
        found.append((local, name))
    if model.tied and last_chunk and not first_chunk:
        root = "" if model.core else "language_model."
        found.append(
            (
                "output_layer.weight" if model.core else "word_embeddings_for_head.weight",
                f"{root}embedding.word_embeddings.weight",
            )
        )
    return found


def _write_rank(job: Job, folder: Path, stage: int, expert: int, tensor: int) -> None:
    def piece(name: str, whole: torch.Tensor) -> torch.Tensor:
        return slice_of(job.model, name, whole, tensor, job.tensor)

    chunks = [local_names(job, stage, chunk, expert) for chunk in range(job.virtual)]
    saved: dict[str, Any] = {
        "args": _arguments(job),
        "checkpoint_version": 3.0,
        "iteration": job.iteration,
        "num_floating_point_operations_so_far": 123.0,
    }
    for index, names in enumerate(chunks):
        weights = {local: piece(name, job.model.tensors[name]).to(job.dtype) for local, name in names}
        key = f"model{index}" if job.virtual > 1 else "model"
        saved[key] = _with_extra_state(weights) if job.model.core else _nested(weights)
    names = [name for chunk in chunks for _, name in chunk]
    if job.optimizer in ("float16", "fp32"):
        saved["optimizer"] = _optimizer(job, names, piece)
    elif job.optimizer == "distributed":
        groups = [{**group, "step": 7} for group, _ in _groups(job, names)]
        saved["optimizer"] = {"optimizer": {"param_groups": groups}, "grad_scaler": None}
        torch.save(_distributed(job, chunks, piece), folder / "distrib_optim.pt")
    saved["opt_param_scheduler"] = {"max_lr": 0.1, "num_steps": 700}
    saved["rng_state"] = [{"random_rng_state": (3, (1, 2), None)}]
    torch.save(saved, folder / "model_optim_rng.pt")


def _arguments(job: Job) -> Namespace:
    model = job.model
    return Namespace(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        kv_channels=model.hidden // model.heads,
        group_query_attention=model.groups != model.heads,
        num_query_groups=model.groups,
        swiglu=model.kind != "gpt",
        num_experts=model.experts or None,
        untie_embeddings_and_output_weights=not model.tied,
        padded_vocab_size=model.vocab,
        tensor_model_parallel_size=job.tensor,
        pipeline_model_parallel_size=job.stages,
        virtual_pipeline_model_parallel_size=job.virtual if job.virtual > 1 else None,
        expert_model_parallel_size=job.expert,
        params_dtype=job.dtype,
    )


def _with_extra_state(weights: Tensors) -> dict[str, Any]:
    """Transformer Engine leaves an `_extra_state` beside each of its layers' weights."""
    found: dict[str, Any] = {}
    for name, tensor in weights.items():
        found[name] = tensor
        if name.endswith("linear_qkv.weight"):
            found[name.replace("weight", "_extra_state")] = torch.zeros(3, dtype=torch.uint8)
    return found


def _nested(weights: Tensors) -> dict[str, Any]:
    """`state_dict_for_save_checkpoint` of the older models: mappings for the parts, flat names in the encoder."""
    found: dict[str, Any] = {}
    for name, tensor in weights.items():
        *path, leaf = name.split(".", 2) if ".encoder." in name else name.split(".")
        at = found
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = tensor
    return found


def _groups(job: Job, names: list[str]) -> list[tuple[dict[str, Any], list[str]]]:
    """Parameter groups: with and without weight decay, dense and expert parameters."""
    found: dict[tuple[float, bool], list[str]] = {}
    for name in names:
        plain = name.endswith(".bias") or job.model.tensors[name].ndim == 1
        found.setdefault((0.0 if plain else 1.0, job.expert > 1 and ".local_experts." in name), []).append(name)
    return [
        (
            {
                "wd_mult": decay,
                "lr_mult": 1.0,
                "is_expert_parallel": expert,
                "is_decoupled_lr": False,
                "lr": 0.01,
                "weight_decay": 0.1 * decay,
                "betas": (0.9, 0.95),
            },
            members,
        )
        for (decay, expert), members in found.items()
    ]


def _optimizer(job: Job, names: list[str], piece: Any) -> Any:
    """One optimizer, or with expert parallelism a chain of those of dense and of expert parameters."""
    groups = _groups(job, names)
    if job.expert == 1:
        return _one_optimizer(job, groups, piece)
    return [
        _one_optimizer(job, [group for group in groups if group[0]["is_expert_parallel"] == expert], piece)
        for expert in (False, True)
    ]


def _one_optimizer(job: Job, groups: list[tuple[dict[str, Any], list[str]]], piece: Any) -> dict[str, Any]:
    numbers = iter(range(10**6))
    state, described = {}, []
    for group, members in groups:
        params = [next(numbers) for _ in members]
        described.append({**group, "params": params, **({"step": 7} if job.apex else {})})
        for number, name in zip(params, members, strict=True):
            state[number] = {key: piece(name, job.state(name, key)) for key in ("exp_avg", "exp_avg_sq")}
            if not job.apex:
                state[number]["step"] = torch.tensor(7.0)
    inner = {"state": state, "param_groups": described}
    if job.optimizer == "fp32":
        return inner
    masters = [[piece(name, job.state(name, "master")) for name in members] for _, members in groups]
    return {"optimizer": inner, "grad_scaler": {"scale": torch.tensor([4.0])}, "fp32_from_fp16_params": masters}


def _distributed(job: Job, chunks: list[list[tuple[str, str]]], piece: Any) -> dict[Any, Any]:
    """`distrib_optim.pt`: per buffer one vector, parameters from the last to the first at multiples of 64."""
    found: dict[Any, Any] = {"buckets_coalesced": True}
    for index, names in enumerate(chunks):
        vectors: dict[str, Any] = {}
        for key, state in (("param", "master"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            vector = torch.zeros(0)
            for _, name in reversed(names):
                flat = piece(name, job.state(name, state)).flatten()
                gap = math.ceil(vector.numel() / 64) * 64 - vector.numel()
                vector = torch.cat([vector, torch.full((gap,), math.nan), flat])
            vectors[key] = vector
        vectors["numel_unpadded"] = vector.numel()
        found[index] = {(job.dtype, torch.float32): vectors}
    return found
