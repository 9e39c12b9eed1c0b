"""DeepSpeed's universal checkpoints: one folder per parameter, one file per state, and copies of the model files.

<root>/latest_universal                        name of the newest folder
<root>/<tag>/zero/<parameter>/fp32.pt          ZeRO 1 and 2: {"param": tensor, ...}; ZeRO 3: the flattened tensor alone
<root>/<tag>/zero/<parameter>/exp_avg.pt ...   the optimizer's states; step.pt, a number (ZeRO 1 and 2)
<root>/<tag>/zero/optimizer_state.pt           hyper-parameters, loss scaler; ZeRO 3: the step
<root>/<tag>/[zero_pp_rank_0_]mp_rank_00_model_states.pt       shapes, buffers, what is not trained, the engine's state

Where the model files say every shape, a tensor's own file is opened when the tensor is first read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import PurePosixPath
from typing import Any

from orchestrator.checkpoint.archive import StoredTensor, load_archive
from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import Files, read_whole
from orchestrator.checkpoint.formats import Reading, deepspeed_files
from orchestrator.checkpoint.formats.deepspeed_flat import STEP, Held, Parameter, Shape, number_of, scalar, step_of
from orchestrator.checkpoint.formats.deepspeed_module import Module, complete, listed, stored
from orchestrator.checkpoint.formats.deepspeed_state import hyper_parameters, plain_state, step_of_model
from orchestrator.checkpoint.formats.pickled_values import Node, Plain
from orchestrator.checkpoint.layout import ITEM_BYTES, Box, Chunk, LogicalTensor, tensor_name
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

NAME = "deepspeed universal"
LATEST = "latest_universal"
"""File in the root that holds the tag of the newest universal checkpoint."""
VALUE = "fp32"
"""Name of the file that holds the value itself."""
OPTIMIZER = "zero/optimizer_state.pt"
INFO = "universal_checkpoint_info"
"""What Megatron-DeepSpeed and others say of how parameters are cut over tensor-parallel ranks."""

_MODEL = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d{1,9})_)?mp_rank_(\d{1,9})_model_states\.pt")

States = dict[str, str]
"""State (or `fp32`) -> file."""


def recognise(files: Files) -> bool:
    """Whether there is a universal checkpoint, and not also the one of DeepSpeed's own that it was made from."""
    places = _places(files)
    if "" in places:
        return True
    beside = deepspeed_files.LATEST in files.names() and deepspeed_files.checkpoints(files)
    return bool(places) and not beside


def open_files(files: Files, reading: Reading) -> UniversalView:
    """The view; raises `CheckpointError` for a tag that is not there, `CorruptCheckpoint` for what does not fit."""
    folder, states = _chosen(files, reading)
    source = _Source(files, folder, states)
    source.read_models()
    source.read_parameters()
    aliases = source.read_module()
    optimizer = source.archive(f"{folder}{OPTIMIZER}")
    step = source.add_steps(optimizer)
    state = plain_state(files, source.models[0], optimizer, source.notes) if source.models else {}
    state |= source.sharding()
    state["param_groups"] = source.parameter_groups(optimizer)
    tensors, dtypes = source.tensors()
    return UniversalView(
        files,
        step=step,
        generation=0,
        state=state,
        tensors=tensors,
        source=NAME,
        aliases=aliases,
        frozen=[name for name, one in source.parameters.items() if one.frozen],
        training_dtypes=dtypes,
        notes=source.notes,
    )


def _places(files: Files) -> dict[str, dict[str, States]]:
    """Folder (empty, or ending in `/`) -> parameter -> its files, of every universal checkpoint below."""
    places: dict[str, dict[str, States]] = {}
    for file in sorted(files.names()):
        head, _, base = file.rpartition("/")
        above, _, parameter = head.rpartition("/")
        if base.endswith(".pt") and (above == "zero" or above.endswith("/zero")):
            states = places.setdefault(above.removesuffix("zero"), {}).setdefault(parameter, {})
            states[base.removesuffix(".pt")] = file
    return {
        folder: parameters
        for folder, parameters in places.items()
        if f"{folder}{OPTIMIZER}" in files.names() or any(VALUE in states for states in parameters.values())
    }


def _chosen(files: Files, reading: Reading) -> tuple[str, dict[str, States]]:
    places = _places(files)
    if "" in places:
        tag = PurePosixPath(files.location).name
        if reading.tag not in (None, tag):
            raise CheckpointError(
                f"{files.location} is the universal checkpoint {tag}, not {reading.tag}: give the folder above it"
            )
        return "", places[""]
    tags = ", ".join(sorted(folder.rstrip("/") for folder in places)[:10])
    wanted = reading.tag
    if wanted is None and LATEST in files.names():
        wanted = read_whole(files, LATEST, 4096).decode(errors="replace").strip()
    if wanted is None:
        if len(places) != 1:
            raise CheckpointError(
                f"{files.location} has no file {LATEST} that says which checkpoint is the newest: choose one of {tags}"
            )
        wanted = next(iter(places)).rstrip("/")
    if f"{wanted}/" not in places:
        raise CheckpointError(
            f"{files.location} holds no universal checkpoint {wanted}: choose one of {tags or 'another place'}"
        )
    return f"{wanted}/", places[f"{wanted}/"]


@dataclass(frozen=True, slots=True)
class _Likeness:
    """What the first file of a state shows, and the others are taken to be like."""

    dtype: str
    flat: bool


@dataclass(slots=True)
class _Source:
    """One checkpoint as it is read, in the order of its methods."""

    files: Files
    folder: str
    states: dict[str, States]
    notes: list[str] = field(default_factory=list)
    models: list[Node] = field(default_factory=list)
    """The model files of the model-parallel ranks (of data-parallel rank 0)."""
    ranks: list[Node] = field(default_factory=list)
    """Those of model-parallel rank 0, of all data-parallel ranks."""
    partitioned: bool = False
    """Weights in the model files are placeholders (ZeRO 3)."""
    shapes: list[list[dict[str, Shape]]] = field(default_factory=list)
    """`param_shapes` of each model-parallel rank."""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    likeness: dict[str, _Likeness] = field(default_factory=dict)

    def archive(self, file: str) -> Node:
        """What a file holds."""
        if file not in self.files.names():
            raise corrupt(self.files.label(file), "it is missing")
        return Node(load_archive(self.files, file), self.files.label(file))

    # ------------------------------------------------------------ model files

    def read_models(self) -> None:
        """Open the model files and read the shapes of the parameters."""
        plain: dict[int, str] = {}
        zero: dict[tuple[int, int], str] = {}
        for file in self.files.names():
            folder, _, base = file.rpartition("/")
            match = _MODEL.fullmatch(base) if folder == self.folder.rstrip("/") else None
            if match and match[1] is None:
                plain[int(match[2])] = file
            elif match:
                zero[int(match[2]), int(match[1])] = file
        self.partitioned = not plain
        firsts = plain or {mp: file for (mp, dp), file in zero.items() if dp == min(rank for _, rank in zero)}
        self.models = [self.archive(firsts[mp]) for mp in sorted(firsts)]
        others = [zero[key] for key in sorted(zero) if key[0] == min(firsts) and zero[key] != firsts[key[0]]]
        self.ranks = self.models[:1]
        if self.partitioned and self.models and self._is_cut(self.models[0]):
            self._require_all_before(dp for mp, dp in zero if mp == min(firsts))
            self.ranks += [self.archive(file) for file in others]
        for rank, at in enumerate(sorted(firsts)):
            if rank != at:
                raise corrupt(self.files.label(f"{self.folder}mp_rank_{rank:02d}_model_states.pt"), "it is missing")
        for model in (*self.models, *self.ranks[1:]):
            if model.mapping().keys().isdisjoint(("module", "param_shapes")):
                raise model.fail("holds neither module nor param_shapes, so that it is no model file")
        for model in self.models:
            groups = model.find("param_shapes")
            self.shapes.append([] if groups is None else [_shapes(group) for group in groups.items()])

    def _require_all_before(self, present: Iterable[int]) -> None:
        """The first data-parallel ranks' model files are there: pieces are joined in their order."""
        for rank, at in enumerate(sorted(present)):
            if rank != at:
                file = f"{self.folder}zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
                raise corrupt(self.files.label(file), "it is missing")

    def _is_cut(self, model: Node) -> bool:
        """Whether what is not trained is in parts, of which the other data-parallel ranks have the rest."""
        return bool(model.find("frozen_param_fragments"))

    @property
    def cut(self) -> bool:
        """Whether the shapes in the model files may be those of pieces."""
        return len(self.models) != 1 or self.models[0].find(INFO) is not None

    # ------------------------------------------------------------ parameters

    def read_parameters(self) -> None:
        """The parameters that are trained, with their values and states."""
        shapes: dict[str, Shape] = {}
        for model, groups in zip(self.models, self.shapes, strict=True):
            counted = Counter(name for group in groups for name in group)
            for name, count in counted.most_common(1):
                if count > 1:
                    raise model.fail("has it in two of its groups", name)
            for group in groups:
                shapes |= {name: shape for name, shape in group.items() if name not in shapes}
        for name, shape in shapes.items():
            self._add(name, shape)
        for groups in self.shapes:
            # Under ZeRO 3 these are sub-groups, which say nothing, and DeepSpeed's loader reads the same of all.
            for names in [list(shapes)] if self.partitioned else groups:
                self._require_same_states(names)

    def _add(self, name: str, shape: Shape | None) -> None:
        files = self.states.get(name, {})
        if VALUE not in files:
            raise corrupt(self.files.label(f"{self.folder}zero/{name}/{VALUE}.pt"), "it is missing", name)
        parameter: Parameter | None = None
        for state in sorted(files, key=lambda state: state != VALUE):
            if state == STEP:
                held = self._step(files[state], name)
            elif shape is None or self.cut:
                held = self._opened(state, files[state], name, shape)
            else:
                held = self._unopened(state, files[state], name, shape)
            if parameter is None:
                parameter = self.parameters[name] = Parameter(held.shape)
            elif held.shape not in ((), parameter.shape):
                file = self.files.label(files[state])
                raise corrupt(
                    file, f"its shape is {list(held.shape)}, but {VALUE}.pt has {list(parameter.shape)}", name
                )
            parameter.tensors[None if state == VALUE else state] = held

    def _require_same_states(self, names: Collection[str]) -> None:
        """Parameters of a group share one flat vector per state: a state that only some have was lost."""
        known = {state for name in names for state in self.states[name]}
        for name in names:
            for state in sorted(known - self.states[name].keys()):
                file = self.files.label(f"{self.folder}zero/{name}/{state}.pt")
                raise corrupt(file, "it is missing, while other parameters of its group have it", name)

    def _opened(self, state: str, file: str, name: str, shape: Shape | None) -> Held:
        """A tensor whose file is opened to see its shape."""
        node = self.archive(file)
        if not isinstance(node.value, dict):
            found = node.tensor(name)
            if shape is None:
                raise node.fail("holds a flat tensor, and no model file says its shape", name)
            if found.elements != prod(shape):
                raise node.fail(f"has {found.elements} elements where {list(shape)} is expected", name)
            if found.strides is not None or len(found.shape) != 1:
                raise node.fail("is a tensor where a flat one is expected", name)
            return Held(found.dtype, shape, _chunks(shape, Chunk(Box.whole(shape), file, found.begin)))
        return stored(self.files, node.at("param"), name)

    def _unopened(self, state: str, file: str, name: str, shape: Shape) -> Held:
        """A tensor whose file is opened when it is first read."""
        like = self.likeness.get(state)
        if like is None:
            node = self.archive(file)
            like = self.likeness[state] = _Likeness(_tensor(node, name).dtype, not isinstance(node.value, dict))
        count = self.files.size(file)
        if count < prod(shape) * ITEM_BYTES[like.dtype]:
            raise corrupt(self.files.label(file), f"it has {count} bytes, too few for {like.dtype} {list(shape)}", name)
        outer = (prod(shape),) if like.flat else None
        chunk = Chunk(Box.whole(shape), file, 0, blob_bytes=count, blob_shape=outer)
        return Held(like.dtype, shape, _chunks(shape, chunk))

    def _step(self, file: str, name: str) -> Held:
        """The optimizer's step: torch's optimizers keep an F32 number, some others an integer."""
        like = self.likeness.get(STEP)
        if like is None or like.dtype != "F32":
            node = self.archive(file)
            found = node.value
            dtype = found.dtype if isinstance(found, StoredTensor) and not found.shape else ""
            self.likeness[STEP] = _Likeness(dtype, flat=False)
            return scalar(STEP, step_of(self.files, node))
        return Held("F32", (), (Chunk(Box((), ()), file, 0, blob_bytes=self.files.size(file)),))

    # ------------------------------------------------------------ the module

    def read_module(self) -> dict[str, str]:
        """Buffers, what is not trained, training dtypes; returns the tied names. Then whatever else has a folder."""
        module = Module()
        for model in self.models:
            values = model.find("module")
            module.take(model, [] if values is None else values.named())
            module.take_shared(model)
        aliases: dict[str, str] = {}
        if len(self.models) == 1:
            module.take_fragments(self.ranks)
            partitioned = self.partitioned
            aliases = complete(self.files, module, self.parameters, partitioned=partitioned, notes=self.notes)
        else:
            self._read_cut_module(module)
        known = self.parameters.keys() | aliases.keys() | module.values.keys() | module.frozen_shapes.keys()
        for name in self.states:
            if name not in known and VALUE in self.states[name]:
                self._add(name, None)
        if not self.models:  # they alone know what is frozen, tied or a buffer
            raise corrupt(self.files.label(f"{self.folder}mp_rank_00_model_states.pt"), "it is missing")
        default = self._training_dtype()
        for one in self.parameters.values():
            if one.kind == "parameter" and one.training_dtype is None:
                one.training_dtype = default
        return aliases

    def _read_cut_module(self, module: Module) -> None:
        lost = []
        for name, node in module.values.items():
            if name in self.parameters:
                self.parameters[name].training_dtype = node.tensor(name).dtype
            elif name in (module.buffers or ()):
                held = stored(self.files, node, name)
                self.parameters[name] = Parameter(held.shape, "buffer", tensors={None: held})
            elif name not in module.shared:
                lost.append(name)
        if lost:
            self.notes.append(
                f"What is not trained lies in the model files in pieces, and the checkpoint does not say how they make "
                f"one tensor: {listed(sorted(lost))} is left out."
            )

    def _training_dtype(self) -> str | None:
        config = self.models[0].find("ds_config") if self.models else None
        for key, dtype in (("bf16", "BF16"), ("bfloat16", "BF16"), ("fp16", "F16")):
            section = config.find(key) if config is not None else None
            enabled = section.find("enabled") if section is not None else None
            if enabled is not None and enabled.value is True:
                return dtype
        return None

    # ------------------------------------------------------------ the rest

    def add_steps(self, optimizer: Node) -> int:
        """Give parameters without one the step that ZeRO 3 keeps with the optimizer; returns the training step."""
        inner = optimizer.find("optimizer_state_dict")
        states = inner.find("state") if inner is not None else None
        first = states.find(0) if states is not None else None
        node = first.find(STEP) if first is not None else None
        number = None if node is None else step_of(self.files, node)
        for parameter in self.parameters.values():
            if number is not None and len(parameter.tensors) > 1:
                parameter.tensors.setdefault(STEP, scalar(STEP, number))
        for name, parameter in self.parameters.items():
            if number is None and STEP in parameter.tensors:
                number = number_of(self.files, self.archive(self.states[name][STEP]))
        counted = step_of_model(self.models[0]) if self.models else 0
        return counted or int(number or 0)

    def parameter_groups(self, optimizer: Node) -> list[dict[str, Any]]:
        """Hyper-parameters of each group with the names of its parameters."""
        groups = optimizer.find("param_groups")
        if groups is None:
            groups = optimizer.at("optimizer_state_dict").at("param_groups")
        found = hyper_parameters(self.files, groups, self.notes)
        members: list[list[str]] = [[] for _ in found]
        for shapes in self.shapes:
            for index, names in enumerate(_indices(groups, len(shapes))):
                for name in (name for at in names for name in shapes[at]):
                    if name not in members[index]:
                        members[index].append(name)
        return [{**group, "params": names} for group, names in zip(found, members, strict=True)]

    def sharding(self) -> dict[str, Any]:
        """What the source says of tensor-parallel cuts, for a target that cuts again."""
        node = self.models[0].find(INFO) if self.models else None
        return {} if node is None else {INFO: Plain(self.files).of(node)}

    def tensors(self) -> tuple[dict[str, LogicalTensor], dict[str, str]]:
        """The tensors by name, and the training dtypes that are not the tensor's own."""
        tensors: dict[str, LogicalTensor] = {}
        dtypes: dict[str, str] = {}
        for name, parameter in self.parameters.items():
            for state, held in parameter.tensors.items():
                full = tensor_name(name, state)
                if full in tensors:
                    raise corrupt(self.files.label(f"{self.folder}zero/{name}"), "two tensors have this name", full)
                kind = parameter.kind if state is None else "state"
                tensors[full] = LogicalTensor(full, name, state, kind, held.dtype, held.shape, held.chunks)
            dtype = parameter.training_dtype
            if dtype is not None and parameter.kind == "parameter" and dtype != parameter.tensors[None].dtype:
                dtypes[name] = dtype
        return tensors, dtypes


def _shapes(group: Node) -> dict[str, Shape]:
    return {name: shape.shape(name) for name, shape in group.named()}


def _chunks(shape: Shape, chunk: Chunk) -> tuple[Chunk, ...]:
    return (chunk,) if prod(shape) else ()


def _tensor(node: Node, name: str) -> StoredTensor:
    return (node.at("param") if isinstance(node.value, dict) else node).tensor(name)


def _indices(groups: Node, count: int) -> list[list[int]]:
    """For each parameter group, which entries of `param_shapes` are its own: ZeRO 3 lists its sub-groups."""
    listed_ids = [[one.value for one in group.at("params").items()] for group in groups.items()]
    flat = [one for ids in listed_ids for one in ids]
    if len(listed_ids) != count and all(type(one) is int for one in flat) and sorted(flat) == list(range(count)):
        return listed_ids
    if len(listed_ids) < count:
        raise groups.fail(f"has {len(listed_ids)} parameter groups where param_shapes has {count}")
    return [[index] if index < count else [] for index in range(len(listed_ids))]
