"""What does not fit the schema, as one sentence per problem: file, key, what is wrong, what to do."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.core.errors import InvalidInput
from orchestrator.jobfile.fields import show
from orchestrator.jobfile.schema import TrainingJob

_SHOWN = 5
_UNKNOWN = {"extra_forbidden", "invalid_key"}
"""Kinds of pydantic's errors that mean a key which does not exist."""


def validate(mapping: dict[Any, Any], source: str) -> TrainingJob:
    """The job file of `mapping`; raises `InvalidInput` with all problems (the first five), unknown keys first."""
    try:
        return TrainingJob.model_validate(mapping)
    except ValidationError as error:
        details = error.errors(include_url=False)
    details.sort(key=lambda item: item["type"] not in _UNKNOWN)
    shown = [_unknown(item) if item["type"] in _UNKNOWN else _sentence(item) for item in details[:_SHOWN]]
    if len(details) > _SHOWN:
        shown.append(f"and {len(details) - _SHOWN} more")
    raise InvalidInput(f"{source}: {'; '.join(shown)}")


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


def _unknown(item: ErrorDetails) -> str:
    parent, key = item["loc"][:-1], str(item["loc"][-1])
    valid = _keys_at(parent)
    near = difflib.get_close_matches(key.lower(), [name.lower() for name in valid], n=1, cutoff=0.5)
    if near:
        best = next(name for name in valid if name.lower() == near[0])
        hint = f"did you mean {_path((*parent, best))}?"
    else:
        elsewhere = difflib.get_close_matches(key, [path[-1] for path in _all_paths()], n=1, cutoff=0.75)
        path = next((path for path in _all_paths() if elsewhere and path[-1] == elsewhere[0]), None)
        hint = f"did you mean {_path(path)}?" if path else f"valid here: {', '.join(valid)}"
    return f"unknown key {show(_path(item['loc']))[1:-1]}: {hint}"


def _sentence(item: ErrorDetails) -> str:
    where = _path(item["loc"])
    value = show(item["input"])
    context: Mapping[str, Any] = item.get("ctx", {})
    match item["type"]:
        case "missing":
            return f"{where} is missing; add it"
        case "misfit":
            return f"{where} must be {context['expected']}, not {context['found']}"
        case "int_type" | "int_parsing" | "int_from_float":
            return f"{where} must be a whole number, not {value}"
        case "float_type" | "finite_number":
            return f"{where} must be a number, not {value}"
        case "string_type":
            return f"{where} must be text, not {value} (put quotes around it if it is meant so)"
        case "bool_type":
            return f"{where} must be true or false, not {value}"
        case "list_type":
            return f"{where} must be a list, not {value}"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"{where} must be a mapping, not {value}"
        case "greater_than_equal":
            return f"{where} must be at least {context['ge']}, not {value}"
        case "less_than_equal" | "less_than":
            limit = context["le"] if "le" in context else context["lt"] - 1
            return f"{where} must be at most {limit}, not {value}"
        case "string_too_short":
            return f"{where} must not be empty"
        case "literal_error":
            return _literal(where, str(context["expected"]), value)
        case "string_too_long":
            return f"{where} must have at most {context['max_length']} characters"
        case "string_pattern_mismatch":
            return f"{where} must be lower-case letters, digits and '-' inside (a DNS-1123 label), not {value}"
    return f"{where} is not acceptable ({item['msg']}): {value}"


_NOT_YET = {
    "spec.checkpoint.format": "other formats are not supported for saving yet",
    "spec.checkpoint.replicas": "copies on other nodes are not supported yet",
    "spec.hardware.peers": "choosing peers by name is not supported yet",
}


def _literal(where: str, expected: str, value: str) -> str:
    because = f" ({_NOT_YET[where]})" if where in _NOT_YET else ""
    return f"{where} must be {expected}, not {value}{because}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the mapping at `location`."""
    model: type[BaseModel] | None = TrainingJob
    for part in location:
        model = next((inner for key, inner in _children(model) if key == part), None) if model else None
    return [key for key, _ in _children(model)] if model else []


def _children(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel] | None]]:
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        if isinstance(alias, AliasChoices):
            yield name, _model_of(field.annotation)
        else:
            yield str(alias), _model_of(field.annotation)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The mapping inside `X`, `X | None` or `Annotated[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in {Union, types.UnionType} or hasattr(annotation, "__metadata__"):
        return next((model for model in map(_model_of, get_args(annotation)) if model), None)
    return None


def _all_paths() -> Iterator[tuple[str, ...]]:
    waiting: list[tuple[tuple[str, ...], type[BaseModel]]] = [((), TrainingJob)]
    while waiting:
        path, model = waiting.pop(0)
        for key, inner in _children(model):
            yield (*path, key)
            if inner is not None:
                waiting.append(((*path, key), inner))
