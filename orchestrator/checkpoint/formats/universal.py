"""The universal form: the view written out, under the model's own parameter names.

<target>/model-00001-of-00002.safetensors      parameters (the fp32 master where there is one) and buffers
<target>/model.safetensors.index.json          which file holds which; Hugging Face tools open both as they are
<target>/optimizer-00001-of-00003.safetensors  `<parameter>.<state>`, with an index of its own
<target>/universal.json                        everything else, and a checksum of every byte; written last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.checkpoint.archive import StoredTensor, read_safetensors
from orchestrator.checkpoint.fields import Fields, corrupt, parse_object
from orchestrator.checkpoint.files import MAX_METADATA_BYTES, Files, read_whole
from orchestrator.checkpoint.formats import Reading
from orchestrator.checkpoint.layout import KINDS, Box, Chunk, LogicalTensor, tensor_name
from orchestrator.checkpoint.manifest import digest_of, require_seal, seal
from orchestrator.checkpoint.safetensors_layout import Wanted, index_file, safetensors_file, shards
from orchestrator.checkpoint.stream import Limits, OutputFile, Progress
from orchestrator.checkpoint.target import Digests, partial
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

NAME = "universal"
DESCRIPTION = "universal.json"
"""Name of the file that makes a folder a universal checkpoint."""
OPTIMIZER_INDEX = "optimizer.safetensors.index.json"
FORMAT = "regrow-universal"
VERSION = 1
SHARD_BYTES = 5 << 30
"""Largest file, unless one tensor is larger: what Hugging Face's tools choose, too."""


@dataclass(frozen=True, slots=True)
class _File:
    """An output file with what it holds."""

    output: OutputFile
    wanted: Sequence[Wanted]


# ---------------------------------------------------------------- writing


def write_universal(
    view: UniversalView, target: Path, *, limits: Limits, progress: Progress, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the view into the folder `target`, which appears when it is whole; a killed attempt is gone on with.

    Raises `Conflict` when the target exists, `CheckpointError` when it cannot be written, and what reading raises.
    """
    steps = read_steps(view)
    if not view.tensors:
        raise CheckpointError(f"{view.files.location} holds no tensor: there is nothing to write")
    model = _files(view, "model", [one for one in view.tensors.values() if one.kind != "state"], shard_bytes)
    optimizer = _files(view, "optimizer", [one for one in view.tensors.values() if one.kind == "state"], shard_bytes)
    files = [*model, *optimizer]
    outputs = [one.output for one in files]
    with partial(target) as folder:
        plan = [(one.name, one.size_bytes, digest_of(one.literals[0][1])) for one in outputs]
        digests = folder.fill(view, outputs, plan, limits, progress)
        for prefix, group in (("model", model), ("optimizer", optimizer)):
            if group:
                index = index_file([(one.output.name, one.wanted) for one in group])
                folder.put(f"{prefix}.safetensors.index.json", index)
        folder.put(DESCRIPTION, encode(view, steps, checksums(outputs, digests)))
        folder.publish()


def checksums(outputs: Sequence[OutputFile], digests: Digests) -> dict[str, list[list[Any]]]:
    """File -> [first byte, byte after the last, xxh3-128] of ranges that tile it."""
    table: dict[str, list[list[Any]]] = {}
    for index, output in enumerate(outputs):
        ranges = [[begin, begin + len(data), digest_of(data)] for begin, data in output.literals]
        ranges += [[one.begin, one.end, digests[index, one]] for one in output.segments]
        table[output.name] = sorted(ranges)
    return table


def read_steps(view: UniversalView) -> dict[str, float]:
    """Optimizer step of each parameter that has one."""
    steps = {}
    for tensor in view.tensors.values():
        if tensor.state == "step" and tensor.shape in ((), (1,)) and tensor.dtype in _STEP_DTYPES:
            out = np.zeros((), _STEP_DTYPES[tensor.dtype])
            view.read(tensor.name, Box.whole(tensor.shape), out.reshape(tensor.shape))
            steps[tensor.parameter] = float(out)
    return steps


_STEP_DTYPES = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "I32": np.int32}


def _files(view: UniversalView, prefix: str, tensors: Sequence[LogicalTensor], shard_bytes: int) -> list[_File]:
    wanted = [Wanted(one.name, one.name, Box.whole(one.shape), one.dtype) for one in tensors]
    if not wanted:
        return []
    groups = shards(wanted, shard_bytes)
    names = [f"{prefix}-{index + 1:05d}-of-{len(groups):05d}.safetensors" for index in range(len(groups))]
    return [
        _File(safetensors_file(name, group, {"format": "pt"}), group) for name, group in zip(names, groups, strict=True)
    ]


def encode(view: UniversalView, steps: dict[str, float], table: dict[str, list[list[Any]]]) -> bytes:
    """`universal.json`."""
    tensors = view.tensors.values()
    states: dict[str, list[str]] = {}
    for one in tensors:
        if one.state is not None:
            states.setdefault(one.parameter, []).append(one.state)
    parameters = {
        one.name: {
            "shape": one.shape,
            "dtype": view.training_dtypes.get(one.name, one.dtype),
            "step": steps.get(one.name),
            "states": states.pop(one.name, []),
        }
        for one in tensors
        if one.kind == "parameter"
    }
    body = {
        "format": FORMAT,
        "version": VERSION,
        "source": view.source,
        "step": view.step,
        "parameters": parameters,
        "buffers": [one.name for one in tensors if one.kind == "buffer"],
        "frozen": sorted(view.frozen),
        "aliases": view.aliases,
        "param_groups": view.state.get("param_groups", []),
        "state": {key: value for key, value in view.state.items() if key != "param_groups"},
        "other_states": states,
        "notes": list(view.notes),
        "checksums": table,
    }
    return seal(body)


# ---------------------------------------------------------------- reading


def recognise(files: Files) -> bool:
    """Whether the folder has a `universal.json`, or the optimizer's index that is only ever written beside one.

    Without either it is what Hugging Face's tools take it for: weights.
    """
    return not files.names().isdisjoint((DESCRIPTION, OPTIMIZER_INDEX))


def open_files(files: Files, reading: Reading) -> UniversalView:
    """The view; raises `CorruptCheckpoint` when the description is damaged or does not fit the files."""
    fields = describe(files)
    label = files.label(DESCRIPTION)
    parameters = fields.mapping("parameters")
    states = _states(fields, parameters)
    table = read_table(files, fields)
    stored = _stored(files, table)
    digests = {(file, begin, end): digest for file, ranges in table.items() for begin, end, digest in ranges}
    tensors: dict[str, LogicalTensor] = {}
    frozen = fields.texts("frozen")
    for name, kind, parameter, state in _expected(parameters, fields.texts("buffers"), states):
        found = stored.pop(name, None)
        if found is None:
            raise corrupt(label, "no file holds it", name)
        box = Box.whole(found.shape)
        digest = digests.get((found.file, found.begin, found.begin + found.size_bytes))
        tensors[name] = LogicalTensor(
            name, parameter, state, kind, found.dtype, found.shape, (Chunk(box, found.file, found.begin, digest),)
        )
    if stored:
        raise corrupt(label, "the description does not know it", next(iter(stored)))
    dtypes = _check_parameters(fields, parameters, tensors)
    aliases = fields.mapping("aliases")
    if not all(isinstance(value, str) and value in tensors for value in aliases.values()):
        raise corrupt(label, "its aliases do not name tensors that it holds")
    return UniversalView(
        files,
        step=fields.integer("step"),
        generation=0,
        state=fields.mapping("state") | {"param_groups": [one.data for one in fields.objects("param_groups")]},
        tensors=tensors,
        source=NAME,
        aliases=aliases,
        frozen=frozen,
        training_dtypes=dtypes,
        notes=fields.texts("notes"),
    )


def describe(files: Files) -> Fields:
    """The members of `universal.json`, its own checksum compared."""
    text = read_whole(files, DESCRIPTION)
    fields = parse_object(text, files.label(DESCRIPTION))
    fields.expect("format", FORMAT)
    fields.expect("version", VERSION)
    require_seal(fields, text)
    return fields


def read_table(files: Files, fields: Fields) -> dict[str, list[tuple[int, int, str]]]:
    """The checksums of each file, whose ranges must tile it, and its size be theirs."""
    table: dict[str, list[tuple[int, int, str]]] = {}
    for file, ranges in fields.mapping("checksums").items():
        if file not in files.names():
            raise corrupt(files.label(file), "it is missing")
        position = 0
        table[file] = []
        for one in ranges if isinstance(ranges, list) else [None]:
            begin, end, digest = _range(one)
            if begin != position or end < position:
                raise fields.fail(f"the checksums of {file} do not tile it")
            table[file].append((begin, end, digest))
            position = end
        size_bytes = files.size(file)
        if size_bytes != position:
            raise corrupt(files.label(file), f"it has {size_bytes} bytes instead of {position}")
    return table


def read_ranges(files: Files) -> list[tuple[str, int, int, str]]:
    """(file, first byte, byte after the last, checksum) of ranges that hold every byte of every file."""
    table = read_table(files, describe(files))
    return [(file, *one) for file, ranges in table.items() for one in ranges]


def _range(value: Any) -> tuple[int, int, str]:
    """An entry of the table; (-1, -1, "") for anything else."""
    if isinstance(value, list) and len(value) == 3:
        begin, end, digest = value
        if type(begin) is int and type(end) is int and isinstance(digest, str):
            return begin, end, digest
    return -1, -1, ""


def _stored(files: Files, table: dict[str, list[tuple[int, int, str]]]) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for file, ranges in table.items():
        if not ranges or ranges[0][1] > MAX_METADATA_BYTES:
            raise corrupt(files.label(file), "its checksums do not begin with its header's")
        header = memoryview(bytearray(ranges[0][1]))
        files.read_into(file, 0, header)
        if digest_of(header) != ranges[0][2]:
            raise corrupt(files.label(file), "its header does not match its checksum")
        for name, tensor in read_safetensors(files, file)[0].items():
            if name in stored:
                raise corrupt(files.label(file), f"{files.label(stored[name].file)} holds it, too", name)
            stored[name] = tensor
    return stored


def _states(fields: Fields, parameters: dict[str, Any]) -> dict[str, list[str]]:
    states = {}
    others = {name: {"states": known} for name, known in fields.mapping("other_states").items()}
    for name, entry in (parameters | others).items():
        known = entry.get("states") if isinstance(entry, dict) else None
        if not isinstance(known, list) or not all(isinstance(one, str) for one in known):
            raise fields.of(name).fail("its states are not a list of names")
        states[name] = known
    return states


def _expected(
    parameters: dict[str, Any], buffers: Sequence[str], states: dict[str, list[str]]
) -> list[tuple[str, str, str, str | None]]:
    """(name, kind, parameter, state) of every tensor, in the order of the description."""
    found: list[tuple[str, str, str, str | None]] = [(name, KINDS[0], name, None) for name in parameters]
    found += [(name, KINDS[1], name, None) for name in buffers]
    found += [(tensor_name(name, state), KINDS[2], name, state) for name, known in states.items() for state in known]
    return found


def _check_parameters(fields: Fields, parameters: dict[str, Any], tensors: dict[str, LogicalTensor]) -> dict[str, str]:
    """Shapes as described; returns the training dtypes that are not the tensor's own."""
    dtypes = {}
    for name, entry in parameters.items():
        one = Fields(entry, fields.file, name)
        if one.integers("shape") != tensors[name].shape:
            raise one.fail(f"its shape is {list(tensors[name].shape)} in its file")
        if one.text("dtype") != tensors[name].dtype:
            dtypes[name] = one.text("dtype")
    return dtypes
