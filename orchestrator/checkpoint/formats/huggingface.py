"""Hugging Face weights: `model.safetensors`, shards with an index, or a `torch.save` state dict. No optimizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.checkpoint.archive import StoredTensor, load_archive, read_safetensors
from orchestrator.checkpoint.fields import corrupt, parse_object
from orchestrator.checkpoint.files import Files, read_whole
from orchestrator.checkpoint.formats import Reading
from orchestrator.checkpoint.layout import Box, Chunk, LogicalTensor
from orchestrator.checkpoint.manifest import digest_of
from orchestrator.checkpoint.numbers import FLOATS
from orchestrator.checkpoint.safetensors_layout import Wanted, index_file, safetensors_file, shards
from orchestrator.checkpoint.stream import Limits, Progress
from orchestrator.checkpoint.target import partial
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError, InvalidInput

NAME = "huggingface"
CONFIG = "config.json"
SHARD_BYTES = 5 << 30
"""Largest file that is written, unless one tensor is larger."""
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_TIED = {"lm_head.weight": ("model.embed_tokens.weight", "transformer.wte.weight", "model.decoder.embed_tokens.weight")}
"""Output weight -> the names under which the embedding is stored that it is tied to."""


def recognise(files: Files) -> bool:
    """Whether there is an index, a model file, or nothing but safetensors and `torch.save` files of one state dict."""
    names = files.names()
    if any(name in names for name in (*_INDEXES, *_SINGLES)):
        return True
    top = [name for name in names if "/" not in name]
    return any(name.endswith(".safetensors") for name in top) or (len(names) == 1 and _is_torch_file(next(iter(names))))


def _is_torch_file(name: str) -> bool:
    return PurePosixPath(name).suffix in (".bin", ".pt", ".pth", ".ckpt")


def open_files(files: Files, reading: Reading) -> UniversalView:
    """The view: every tensor is a parameter, as nothing says which are buffers; nothing is known of an optimizer."""
    if reading.tag is not None:
        raise InvalidInput(f"{files.location} holds one set of weights: leave out the tag {reading.tag!r}")
    expected = _index(files)
    stored: dict[str, StoredTensor] = {}
    notes = ["weights only: the source holds no optimizer state"]
    for file in sorted(set(expected.values())) if expected else _single(files):
        found, unread = _tensors(files, file)
        if unread:
            notes = [f"weights only: of {files.label(file)} this is not read: {', '.join(unread)}"]
        for name, tensor in found.items():
            if name in stored:
                raise corrupt(files.label(file), f"{files.label(stored[name].file)} holds it, too", name)
            stored[name] = tensor
    for name, file in expected.items():
        if name not in stored or stored[name].file != file:
            raise corrupt(files.label(file), "it lacks a tensor that the index names", name)
    tensors, aliases = _logical(stored)
    return UniversalView(
        files,
        step=0,
        generation=0,
        state={"param_groups": []},
        tensors=tensors,
        source=NAME,
        aliases=aliases | _tied(files, tensors),
        notes=notes,
    )


def _index(files: Files) -> dict[str, str]:
    """Tensor -> file, as the index says; empty without an index."""
    for index in _INDEXES:
        if index in files.names():
            fields = parse_object(read_whole(files, index), files.label(index))
            weights = fields.mapping("weight_map")
            for name, file in weights.items():
                if not isinstance(file, str) or file not in files.names():
                    raise corrupt(
                        files.label(index), f"it names the file {str(file)[:100]!r}, which is not there", name
                    )
            return weights
    return {}


def _single(files: Files) -> list[str]:
    names = files.names()
    for single in _SINGLES:
        if single in names:
            return [single]
    found = sorted(name for name in names if "/" not in name and name.endswith(".safetensors"))
    return found or sorted(name for name in names if _is_torch_file(name))


def _tensors(files: Files, file: str) -> tuple[dict[str, StoredTensor], list[str]]:
    """The weights in a file, and what it holds besides."""
    if file.endswith(".safetensors"):
        return read_safetensors(files, file)[0], []
    content = load_archive(files, file)
    unread: list[str] = []
    for key in ("model", "state_dict", "module", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            unread = [str(other) for other in content if other != key]
            content = content[key]
            break
    if not isinstance(content, dict):
        raise corrupt(files.label(file), f"it holds a {type(content).__name__} instead of a state dict")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, StoredTensor)}
    if not tensors:
        raise CheckpointError(f"{files.label(file)} holds no state dict of tensors: give a file of weights")
    return tensors, unread


def _logical(stored: dict[str, StoredTensor]) -> tuple[dict[str, LogicalTensor], dict[str, str]]:
    """Tensors, and the names that share another's bytes."""
    tensors: dict[str, LogicalTensor] = {}
    aliases: dict[str, str] = {}
    places: dict[Any, str] = {}
    for name, one in stored.items():
        place = (one.file, one.begin, one.shape, one.strides)
        if one.elements and places.setdefault(place, name) != name:
            aliases[name] = places[place]
            continue
        chunk = Chunk(Box.whole(one.shape), one.file, one.begin, strides=one.strides)
        tensors[name] = LogicalTensor(name, name, None, "parameter", one.dtype, one.shape, (chunk,))
    return tensors, aliases


def _tied(files: Files, tensors: dict[str, LogicalTensor]) -> dict[str, str]:
    """What `config.json` says of tied embeddings, where the output weight is not stored."""
    if CONFIG not in files.names():
        return {}
    config = parse_object(read_whole(files, CONFIG, 1 << 24), files.label(CONFIG)).data
    if not config.get("tie_word_embeddings", False):
        return {}
    return {
        alias: owner for alias, owners in _TIED.items() for owner in owners if alias not in tensors and owner in tensors
    }


# ---------------------------------------------------------------- writing


def write_huggingface(
    view: UniversalView, target: Path, *, limits: Limits, progress: Progress, dtype: str | None = None
) -> None:
    """Write parameters and buffers, under their names, in the dtype they are trained with (or `dtype`).

    A `config.json` of the source goes along. Raises `InvalidInput` for a dtype that weights are not rounded to,
    `Conflict` when the target exists, `CheckpointError` when it cannot be written, and what reading raises.
    """
    if dtype is not None and dtype not in FLOATS:
        raise InvalidInput(f"{dtype!r} is not a dtype to write weights in: choose one of {', '.join(FLOATS)}")
    wanted = [
        Wanted(one.name, one.name, Box.whole(one.shape), _dtype(view, one, dtype))
        for one in view.tensors.values()
        if one.kind != "state"
    ]
    if not wanted:
        raise CheckpointError(f"{view.files.location} holds no weights: there is nothing to write")
    groups = shards(wanted, SHARD_BYTES)
    files = [(_file_name(index, len(groups)), group) for index, group in enumerate(groups)]
    outputs = [safetensors_file(name, group, {"format": "pt"}) for name, group in files]
    with partial(target) as folder:
        plan = [(one.name, one.size_bytes, digest_of(one.literals[0][1])) for one in outputs]
        folder.fill(view, outputs, plan, limits, progress)
        if len(files) > 1:
            folder.put(_INDEXES[0], index_file(files))
        if CONFIG in view.files.names():
            folder.put(CONFIG, _config(read_whole(view.files, CONFIG, 1 << 24), wanted))
        folder.publish()


def _file_name(index: int, count: int) -> str:
    return _SINGLES[0] if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _dtype(view: UniversalView, tensor: LogicalTensor, dtype: str | None) -> str:
    if tensor.dtype not in FLOATS:
        return tensor.dtype
    if dtype is not None and tensor.kind == "parameter":
        return dtype
    return view.training_dtypes.get(tensor.name, tensor.dtype)


def _config(text: bytes, wanted: Iterable[Wanted]) -> bytes:
    """The source's configuration; a dtype that it states is the one that is written."""
    try:
        config = json.loads(text)
    except ValueError:
        return text
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    written = {one.dtype for one in wanted if one.dtype in names}
    for key in ("torch_dtype", "dtype"):
        if isinstance(config, dict) and key in config and len(written) == 1:
            config[key] = names[next(iter(written))]
    return json.dumps(config, indent=2).encode() + b"\n"
