"""Megatron-LM's `torch_dist`: whole tensors as a distributed checkpoint of PyTorch, what is no tensor in `common.pt`.

Layers may be stacked along a dimension of their own (`decoder.layers.mlp.linear_fc1.weight` of all layers): here each
is a tensor. Optimizer states that data-parallel ranks divide are saved as a grid of cells, each flattened
(`megatron/core/dist_checkpointing/strategies/torch.py`): here they have the parameter's shape again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from orchestrator.checkpoint.archive import load_archive
from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.dcp_metadata import Saved, read_inventory
from orchestrator.checkpoint.formats.megatron_merge import BUFFER, STATE_KEYS, default_rules, variables
from orchestrator.checkpoint.formats.megatron_optimizer import (
    Kinds,
    chained,
    hyper_parameters,
    number_of_steps,
    scalar,
)
from orchestrator.checkpoint.formats.megatron_ranks import arguments_of
from orchestrator.checkpoint.formats.pickled_values import Node, Plain
from orchestrator.checkpoint.language import Rule, Rules, Shard, merge
from orchestrator.checkpoint.layout import ITEM_BYTES, Chunk, LogicalTensor, tensor_name
from orchestrator.checkpoint.merging import select, unflatten
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

COMMON = "common.pt"
MASTER = "fp32_param"
MAX_LAYERS = 10_000
_STATE = re.compile(r"(?:chained_\d{1,3}\.)?optimizer\.state\.([^.]+)\.(.+)")
_BUCKETS = re.compile(r"(?:chained_\d{1,3}\.)?optimizer\.distributed\..*")
_STACK = re.compile(r"((?:.*\.)?layers)\.(?!\d+\.)(.+)")


class Distributed:
    """A checkpoint in one folder (empty, or with a `/` at the end)."""

    def __init__(self, files: Files, folder: str, rules: Rules | None) -> None:
        self.files = files
        self.inventory = read_inventory(files, folder)
        self.label = self.inventory.label
        self.common = Node(load_archive(files, folder + COMMON), files.label(folder + COMMON))
        self.arguments = arguments_of(self.common)
        rules = default_rules(self.arguments, "megatron-torch-dist") if rules is None else rules
        self.rules = rules.filled(variables(self.arguments))
        self.notes = [*self.inventory.notes, *self.rules.notes]
        self.model: dict[str, Saved] = {}
        self.states: dict[str, dict[str, Saved]] = {}
        """Parameter -> state -> tensor."""
        self.tensors: dict[str, LogicalTensor] = {}
        self.training_dtypes: dict[str, str] = {}

    def view(self) -> UniversalView:
        """Build the view."""
        for key, saved in self.inventory.tensors.items():
            self._sort(key, saved)
        stray = next((name for name in self.states if name not in self.model), None)
        if stray is not None:
            raise corrupt(self.label, "it has optimizer states but no value", stray)
        assigned = self.rules.assign(self.model, self.files.location)
        self.notes += self.rules.unused(assigned)
        groups, step = self._groups()
        for name, rule in assigned.items():
            self._add(name, rule, step)
        iteration = self.common.find("iteration")
        return UniversalView(
            self.files,
            step=0 if iteration is None else iteration.count(),
            generation=0,
            state=self._state(groups),
            tensors=self.tensors,
            source="megatron-lm torch_dist",
            frozen=self._frozen(),
            training_dtypes=self.training_dtypes,
            notes=self.notes,
        )

    # ------------------------------------------------------------ keys

    def _sort(self, key: str, saved: Saved) -> None:
        """Put a tensor where it belongs, with the shape and the name that it has in the model."""
        if _BUCKETS.fullmatch(key):
            raise CheckpointError(
                f"{self.label} holds optimizer states in the order of communication buckets ({key[:200]}), which is "
                "not read: save with --dist-ckpt-optim-fully-reshardable, or without the optimizer"
            )
        match = _STATE.fullmatch(key)
        shape = self.inventory.original_shapes.get(key)
        saved = saved if shape is None else self._unflattened(key, saved, shape)
        for name, one in self._layers(key, match[2] if match else key, saved):
            place = self.model if match is None else self.states.setdefault(name, {})
            index = match[1] if match else name
            if index in place:
                raise corrupt(self.label, "it is there twice", tensor_name(name, match[1] if match else None))
            place[index] = one

    def _unflattened(self, key: str, saved: Saved, shape: tuple[int, ...]) -> Saved:
        """A tensor of `shape` from a grid of its cells, each flattened along the last dimension."""
        grid = saved.shape[:-1]
        pairs = list(zip(shape, grid, strict=False))
        fits = len(grid) == len(shape) and all(cells and not size % cells for size, cells in pairs)
        cell = tuple(size // cells for size, cells in pairs) if fits else ()
        if not fits or math.prod(cell) != saved.shape[-1]:
            raise corrupt(self.label, f"the grid {list(saved.shape)} is none of its shape {list(shape)}", key)
        chunks: list[Chunk] = []
        for chunk in saved.chunks:
            *at, start = chunk.box.offsets
            if any(size != 1 for size in chunk.box.sizes[:-1]) or chunk.strides is not None:
                raise corrupt(self.label, f"its chunk {chunk.box} is no part of one flattened cell", key)
            base = tuple(index * size for index, size in zip(at, cell, strict=True))
            parts = unflatten(chunk, cell, start, chunk.box.sizes[-1], ITEM_BYTES[saved.dtype])
            chunks += [part.moved(part.box.shifted(base)) for part in parts]
        return Saved(saved.dtype, shape, tuple(chunks))

    def _layers(self, key: str, name: str, saved: Saved) -> Iterator[tuple[str, Saved]]:
        """The tensor, or each layer of a stack of them, with its name."""
        match = _STACK.fullmatch(name)
        if match is None:
            yield name, saved
            return
        if not saved.shape or not math.prod(saved.shape) or saved.shape[0] > MAX_LAYERS:
            raise corrupt(self.label, f"its shape {list(saved.shape)} is none of a stack of layers", key)
        layers: list[list[Chunk]] = [[] for _ in range(saved.shape[0])]
        for chunk in saved.chunks:
            for index in range(chunk.box.offsets[0], chunk.box.offsets[0] + chunk.box.sizes[0]):
                layers[index].append(select(chunk, index, ITEM_BYTES[saved.dtype]))
        for index, chunks in enumerate(layers):
            yield f"{match[1]}.{index}.{match[2]}", Saved(saved.dtype, saved.shape[1:], tuple(chunks))

    # ------------------------------------------------------------ tensors

    def _add(self, name: str, rule: Rule, step: float | None) -> None:
        value, states = self.model[name], self.states.get(name, {})
        for state, saved in states.items():
            if saved.shape not in (value.shape, ()):
                reason = f"it has the shape {list(saved.shape)} but the parameter {list(value.shape)}"
                raise corrupt(self.label, reason, tensor_name(name, state))
        master = states.get(MASTER)
        if master is not None and master.dtype != value.dtype:
            self.training_dtypes[name] = value.dtype
        kind = "buffer" if BUFFER.fullmatch(name) else "parameter"
        self._put(name, None, kind, rule, value if master is None else master)
        for state, saved in states.items():
            if state != MASTER:
                self._put(name, state, "state", rule, saved)
        if states and "step" not in states and step is not None:
            self._put(name, "step", "state", rule, Saved("F32", (), scalar(step).shard.chunks))

    def _put(self, parameter: str, state: str | None, kind: str, rule: Rule, saved: Saved) -> None:
        name = tensor_name(parameter, state)
        shard = Shard(saved.shape, saved.chunks)
        self.tensors[name] = merge(name, parameter, state, kind, saved.dtype, rule, [shard])

    def _frozen(self) -> list[str]:
        """Parameters without states, where others have some."""
        if not self.states:
            return []
        return [name for name in self.model if name not in self.states and not BUFFER.fullmatch(name)]

    # ------------------------------------------------------------ common.pt

    def _groups(self) -> tuple[list[tuple[Node, list[str]]], float | None]:
        """The optimizer's groups with their parameters, and the steps that it has taken."""
        node = self.common.find("optimizer")
        if node is None or not self.states:
            return [], None
        inner = [optimizer.find("optimizer") or optimizer for optimizer in chained(node)]
        groups = [group for one in inner if one.find("param_groups") for group in one.at("param_groups").items()]
        kinds = Kinds(groups, {name: self.model[name].shape for name in self.model if name in self.states})
        found = [(group, kinds.take(group, counted=False)) for group in groups]
        if groups:
            kinds.require_all_taken(node)
        steps = [one.at("state").find("common_step") for one in inner if one.find("state")]
        steps += [group.find("step") for group in groups]
        numbers = {number_of_steps(self.files, step) for step in steps if step is not None}
        if len(numbers) > 1:
            raise node.fail(f"has taken {' and '.join(map(str, sorted(numbers)))} steps")
        return found, numbers.pop() if numbers else None

    def _state(self, groups: list[tuple[Node, list[str]]]) -> dict[str, Any]:
        plain = Plain(self.files)
        state = {key: plain.of(node) for key in STATE_KEYS if (node := self.common.find(key)) is not None}
        described = []
        for group, names in groups:
            if not names:
                continue
            hyper = plain.of(Node(hyper_parameters(group), group.label, group.path))
            described.append({**hyper, "params": names})
        state["param_groups"] = described
        left = {key.split("/", 1)[0] for key in self.inventory.blobs}
        dropped = [*plain.dropped, *sorted({key.rpartition(".")[2] for key in left})]
        if dropped:
            self.notes.append(f"What is not plain data is left out of the state: {', '.join(dropped[:10])}.")
        if not self.states:
            self.notes.append("The checkpoint holds no optimizer states.")
        return state
