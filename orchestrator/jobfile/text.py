"""Text -> mapping: YAML (or JSON) without the parts of YAML that surprise or can be abused."""

from __future__ import annotations

import json
from typing import Any

import yaml

from orchestrator.core.errors import InvalidInput

LIMIT_BYTES = 1_000_000
"""A job file is a page long; more than this is some other file, or an attack."""


class _Duplicate(Exception):
    """A key stands twice in one mapping."""


class _Alias(Exception):
    """The text uses a YAML alias, with which a few lines can stand for gigabytes."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once and aliases do not exist."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            raise _Alias(f"line {event.start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise _Duplicate(f"line {key_node.start_mark.line + 1} has a key that is not text")
            if key in mapping:
                raise _Duplicate(f"key {key!r} stands twice (again in line {key_node.start_mark.line + 1})")
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


def read_mapping(text: str, source: str) -> dict[Any, Any]:
    """The mapping that `text` holds; raises `InvalidInput` calling the text `source`."""
    if len(text.encode("utf-8", "surrogatepass")) > LIMIT_BYTES:
        raise InvalidInput(f"{source}: larger than {LIMIT_BYTES // 1_000_000} MB, which no job file is; check the path")
    try:
        data = _read(text)
    except _Alias as error:
        raise InvalidInput(
            f"{source}: YAML aliases (*name) are not supported ({error}); write the value out"
        ) from error
    except _Duplicate as error:
        raise InvalidInput(f"{source}: {error}; keep one") from error
    except yaml.YAMLError as error:
        raise InvalidInput(f"{source}: not valid YAML ({_where(error)}); correct it") from error
    except (ValueError, RecursionError, OverflowError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidInput(f"{source}: holds a value that cannot be read ({reason}); correct it") from error
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {type(data).__name__}"
        raise InvalidInput(f"{source}: must be a mapping with apiVersion, kind, metadata and spec, but is {found}")
    return data


def _read(text: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=_unique)
        except ValueError:
            pass  # a flow mapping of YAML also begins with a brace
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise _Duplicate(f"key {key!r} stands twice")
        mapping[key] = value
    return mapping


def _where(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return place + (error.problem or error.context or "unreadable")
    return str(error).splitlines()[0]
