"""Rules as YAML: files that users write, and the sets that regrow brings along.

name: my-llama
names:                                   # where ranks count layers or experts from their own first one
  - {match: 'layers\\.(?P<layer>\\d+)(?P<rest>\\..*)', stage: 'layers.{layer + firstLayer}{rest}'}
rules:                                   # exactly one must match each parameter
  - {match: 'embedding\\.weight', fragment: {dim: 0}, padded: {to: '{vocab}'}}
  - match: '.*\\.qkv\\.weight'
    fragment: {sections: ['{heads * headDim}', '{kvHeads * headDim}', '{kvHeads * headDim}']}
  - {match: '.*norm.*', replicated: }
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from orchestrator.checkpoint.expressions import compiled
from orchestrator.checkpoint.language import Rules
from orchestrator.checkpoint.patterns import (
    Average,
    Expert,
    Flat,
    Fragment,
    Padding,
    Pattern,
    Renaming,
    Replicated,
    Rule,
    Unique,
)
from orchestrator.core.errors import CheckpointError, InvalidInput

MAX_BYTES = 1 << 18
"""A file of rules larger than this is not read."""
MAX_RULES = 1000
PATTERNS = ("replicated", "average", "unique", "fragment", "flat", "expert")


def load(path: Path) -> Rules:
    """The rules in a file; raises `InvalidInput` that names file and rule."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"rules {path} cannot be read ({error.strerror}): give a file") from error
    return parse(text, str(path))


def named(name: str) -> Rules:
    """The rule set of that name which regrow brings along, or else of the file at that path."""
    if name in shipped():
        return parse((_folder() / f"{name}.yaml").read_bytes(), name)
    if Path(name).is_file():
        return load(Path(name))
    raise InvalidInput(f"there are no rules {name!r}: give a file, or one of {', '.join(shipped())}")


def shipped() -> list[str]:
    """Names of the rule sets that regrow brings along."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("orchestrator.checkpoint") / "rules"


def parse(text: bytes, source: str) -> Rules:
    """The rules in YAML `text`; errors name `source`."""
    if len(text) > MAX_BYTES:
        raise InvalidInput(f"rules {source} have more than {MAX_BYTES} bytes: give a shorter file")
    try:
        data = yaml.load(text, _Loader)  # noqa: S506 (a safe loader, without aliases)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InvalidInput(f"rules {source} are not YAML ({' '.join(str(error).split())[:200]}): correct it") from error
    top = _Fields(data, f"rules {source}", {"name", "description", "names", "rules"})
    name = top.text("name")
    rules = tuple(_rule(entry, f"rule {index} of {source}") for index, entry in enumerate(top.items("rules"), 1))
    names = tuple(_renaming(entry, f"name {index} of {source}") for index, entry in enumerate(top.items("names"), 1))
    if not rules:
        raise InvalidInput(f"rules {source} hold no rules: write a list of them under rules")
    return Rules(name, rules, names)


class _Loader(yaml.SafeLoader):
    """Safe, and without aliases: a few of them make gigabytes of a few bytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        made = super().construct_mapping(node, deep)
        if len(made) != len(node.value):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} repeats a key")
        return made


class _Fields:
    """A mapping whose members are asked for by type, with errors that say where it is."""

    def __init__(self, data: Any, where: str, known: set[str]) -> None:
        self.data, self.where = data, where
        if not isinstance(data, dict):
            raise self.wrong("is no mapping")
        unknown = [str(key) for key in data if key not in known]
        if unknown:
            raise self.wrong(f"has the unknown key {unknown[0][:50]!r} (known are {', '.join(sorted(known))})")

    def wrong(self, reason: str) -> InvalidInput:
        return InvalidInput(f"{self.where} {reason}: correct it")

    def text(self, key: str) -> str:
        value = self.data.get(key)
        if not isinstance(value, str) or not value:
            raise self.wrong(f"has no text under {key}")
        return value

    def integer(self, key: str, default: int) -> int:
        value = self.data.get(key, default)
        if type(value) is not int or abs(value) > 2**62:
            raise self.wrong(f"has no whole number under {key}")
        return value

    def count(self, key: str) -> int | str:
        return self.as_count(self.data.get(key), key)

    def as_count(self, value: Any, key: str) -> int | str:
        """A number that is not negative, or an expression."""
        if (type(value) is int and 0 <= value < 2**62) or (isinstance(value, str) and value):
            return value
        raise self.wrong(f"has under {key} neither a count nor an expression such as '{{heads * headDim}}'")

    def items(self, key: str) -> list[Any]:
        value = self.data.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > MAX_RULES:
            raise self.wrong(f"has no list of at most {MAX_RULES} items under {key}")
        return value


def _rule(data: Any, where: str) -> Rule:
    fields = _Fields(data, where, {"match", "padded", "optional", *PATTERNS})
    match = _regular(fields)
    given = [key for key in PATTERNS if key in data]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise fields.wrong(f"({match}) must have exactly one of {', '.join(PATTERNS)} but has {found}")
    optional = data.get("optional", False)
    if not isinstance(optional, bool):
        raise fields.wrong("has neither true nor false under optional")
    padded = None
    if "padded" in data:
        inner = _Fields(data["padded"], f"padded of {where}", {"to", "dim"})
        padded = Padding(inner.count("to"), inner.integer("dim", 0))
    return Rule(match, _pattern(given[0], data[given[0]], where), padded, optional)


def _pattern(kind: str, data: Any, where: str) -> Pattern:
    known = {"fragment": {"dim", "sections", "count", "widths"}, "expert": {"dim"}}.get(kind, set())
    fields = _Fields({} if data is None else data, f"{kind} of {where}", known)
    if kind == "fragment":
        return _fragment(fields)
    if kind == "expert":
        return Expert(fields.integer("dim", 0))
    plain: dict[str, Pattern] = {"replicated": Replicated(), "average": Average(), "unique": Unique(), "flat": Flat()}
    return plain[kind]


def _fragment(fields: _Fields) -> Fragment:
    sections = tuple(fields.as_count(size, "sections") for size in fields.items("sections"))
    count = fields.integer("count", 1)
    if count < 1 or (count > 1 and sections):
        raise fields.wrong("has both sections and count, or a count below 1")
    widths = []
    for section in fields.items("widths"):
        if not isinstance(section, list) or not all(type(width) is int and 0 <= width < 2**62 for width in section):
            raise fields.wrong("has under widths no list of sizes for each section")
        widths.append(tuple(section))
    return Fragment(fields.integer("dim", 0), sections, count, tuple(widths))


def _renaming(data: Any, where: str) -> Renaming:
    fields = _Fields(data, where, {"match", "stage", "expert"})
    match = _regular(fields)
    given = [key for key in ("stage", "expert") if key in data]
    if len(given) != 1:
        raise fields.wrong("must have either stage or expert")
    return Renaming(match, fields.text(given[0]))


def _regular(fields: _Fields) -> str:
    match = fields.text("match")
    try:
        compiled(match)
    except CheckpointError as error:
        raise InvalidInput(f"{fields.where}: {error}") from error
    return match
