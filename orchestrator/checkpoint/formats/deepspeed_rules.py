"""`universal_checkpoint_info` as rules of the language: how the tensor-parallel ranks' pieces make one tensor.

The lists of name patterns have an order of precedence (replicated, averaged, two fused parts, fused parts,
row-parallel, else column-parallel), so that the rule is chosen here, parameter by parameter. Whatever several pipeline
stages hold is one parameter, so that `pipeline_replicated_parameter_patterns` say nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.checkpoint.expressions import compiled
from orchestrator.checkpoint.formats.deepspeed_affine import AffineMap, affine_map, affine_maps
from orchestrator.checkpoint.formats.deepspeed_flat import Shape
from orchestrator.checkpoint.formats.deepspeed_module import listed
from orchestrator.checkpoint.formats.pickled_values import Node, short
from orchestrator.checkpoint.language import Average, Fragment, Padding, Pattern, Replicated, Rule, Rules
from orchestrator.checkpoint.unpickle import Record
from orchestrator.core.errors import CheckpointError

INFO = "universal_checkpoint_info"
_REPLICATED = "tp_replicated_parameter_patterns"
_AVERAGE = "parameter_to_average_patterns"
_TWO = "parameter_with_2_sub_params_cat_dim_0"
_FUSED = "parameter_with_sub_params"
_ROW = "parameter_with_row_parallelism_patterns"
_VOCABULARY = "vocabulary_parameter_patterns"
_LISTS = (_REPLICATED, _AVERAGE, _TWO, _ROW, _VOCABULARY)
_WIDTHS_VERSION = 0.4
"""From this version on the widths of fused parts on every rank are written down; before, ranks had equal shares."""


@dataclass(frozen=True, slots=True)
class _Fused:
    """An entry of `parameter_with_sub_params`."""

    patterns: tuple[str, ...]
    dim: int
    sizes: tuple[int, ...] | None
    """Of the fused parts along `dim`; None for `count` equal ones."""
    count: int


class Chooser:
    """Which rule says how the pieces of a parameter make one tensor; remembers what it had to assume."""

    def __init__(self, info: Node | None, rules: Rules | None, ranks: int) -> None:
        self.info, self.rules, self.ranks = info, rules, ranks
        self.lists = {key: _patterns(info, key) for key in _LISTS}
        self.fused = _fused(info)
        self.maps = affine_maps(info)
        self.version = _version(info)
        self.unused = {pattern for patterns in self.lists.values() for pattern in patterns}
        self.unused |= {pattern for entry in self.fused for pattern in entry.patterns}
        self._split: list[str] = []
        self._same: list[str] = []
        self._refuse_unsupported()

    def rule(self, name: str, kind: str, shapes: Sequence[Shape]) -> Rule | AffineMap | None:
        """The rule for a parameter or buffer with these shapes on the ranks; None when rank 0 holds all there is."""
        geometric = affine_map(self.maps, name, self.ranks)
        if geometric is not None:
            self._listed(name)  # an older reader's: used, too
            padding = self._padding(name, Replicated(), [geometric.shape])
            return geometric if padding is None else replace(geometric, rows=int(padding.to))
        pattern, match = self._listed(name)
        if pattern is None and self.info is None and self.rules is not None:
            rule = self._given(name)
            if rule is not None:
                return rule
        padded = self._padding(name, pattern, shapes)
        if len(shapes) == 1 and padded is None:
            return None
        if pattern is None:
            pattern = self._assumed(name, kind, shapes)
        return Rule(match, pattern, padded)

    def notes(self) -> list[str]:
        """What was assumed, and which patterns matched nothing; whole sentences."""
        found = []
        if self._split:
            found.append(
                f"The checkpoint has no {INFO}, so that the pieces of {listed(self._split)} were put together along "
                "dimension 0 in the order of the tensor-parallel ranks: give rules if that is not how they were split."
            )
        if self._same:
            found.append(
                f"As nothing says otherwise, these are taken to be the same on every tensor-parallel rank: "
                f"{listed(self._same)}."
            )
        if self.unused:
            found.append(f"Patterns of {INFO} that match no parameter: {listed(sorted(self.unused))}.")
        return found

    def _listed(self, name: str) -> tuple[Pattern | None, str]:
        """What the lists say, and the pattern that matched."""
        if match := self._one(_REPLICATED, name):
            return Replicated(), match
        if match := self._one(_AVERAGE, name):
            return Average(), match
        if match := self._one(_TWO, name):
            return Fragment(0, count=2), match
        for entry in self.fused:
            for match in entry.patterns:
                if _matches(match, name):
                    self.unused.discard(match)
                    return self._fragment(entry, match, name), match
        if match := self._one(_ROW, name):
            return Fragment(1), match
        return None, name

    def _given(self, name: str) -> Rule | None:
        assert self.rules is not None
        if self.ranks > 1:
            return self.rules.match(name)
        try:
            return self.rules.match(name)
        except CheckpointError:
            return None  # one rank holds it whole

    def _assumed(self, name: str, kind: str, shapes: Sequence[Shape]) -> Pattern:
        """DeepSpeed's own default: column-parallel. Buffers and scalars are not split."""
        if kind == "buffer" or not shapes[0]:
            self._same.append(name)
            return Replicated()
        if self.info is None and len(shapes) > 1:
            self._split.append(name)
        return Fragment(0)

    def _one(self, key: str, name: str) -> str | None:
        """The one pattern of a list that matches."""
        found = [pattern for pattern in self.lists[key] if _matches(pattern, name)]
        self.unused.difference_update(found)
        if len(found) > 1:
            raise self._wrong(f"{key} has several patterns that match it ({', '.join(map(repr, found))})", name)
        return found[0] if found else None

    def _padding(self, name: str, pattern: Pattern | None, shapes: Sequence[Shape]) -> Padding | None:
        """The vocabulary without the rows that were added to share it evenly."""
        if self._one(_VOCABULARY, name) is None:
            return None
        assert self.info is not None
        size = self.info.at("original_vocab_size").count()
        rows = [shape[0] if shape else 0 for shape in shapes]
        split = not isinstance(pattern, Replicated | Average) and not (isinstance(pattern, Fragment) and pattern.dim)
        return Padding(size) if size < (sum(rows) if split else rows[0]) else None

    def _fragment(self, entry: _Fused, match: str, name: str) -> Fragment:
        if self.version < _WIDTHS_VERSION:
            uneven = [size for size in entry.sizes or () if size % self.ranks]
            if uneven:
                raise self._wrong(f"its parts of {uneven} are not shared evenly by {self.ranks} ranks", name)
            if entry.sizes is None:
                return Fragment(entry.dim, count=entry.count)
            widths = tuple((size // self.ranks,) * self.ranks for size in entry.sizes)
            return Fragment(entry.dim, entry.sizes, widths=widths)
        assert self.info is not None
        said = self.info.at("sub_param_shard_widths").at(match)
        widths = tuple(section.shape(name) for section in said.items())
        if entry.sizes is None or tuple(map(sum, widths)) != entry.sizes or any(len(w) != self.ranks for w in widths):
            raise said.fail(f"does not share parts of {entry.sizes or entry.count} among {self.ranks} ranks", name)
        return Fragment(entry.dim, entry.sizes, widths=widths)

    def _wrong(self, reason: str, name: str) -> CheckpointError:
        place = "" if self.info is None else f" of {self.info.label}"
        return CheckpointError(f"{INFO}{place} does not fit {name}: {reason}; give rules for this checkpoint")

    def _refuse_unsupported(self) -> None:
        unsupported = None if self.info is None else self.info.find("autotp_unsupported_parameter_patterns")
        if unsupported is not None and unsupported.mapping():
            first, reason = next(iter(unsupported.named()))
            raise unsupported.fail(f"says that {first!r} cannot be put together ({short(reason.value)})")


def _matches(pattern: str, name: str) -> bool:
    return compiled(pattern).match(name) is not None


def _patterns(info: Node | None, key: str) -> tuple[str, ...]:
    found = None if info is None else info.find(key)
    if found is None:
        return ()
    return tuple(dict.fromkeys(_text(one) for one in found.items()))


def _text(node: Node) -> str:
    if not isinstance(node.value, str):
        raise node.fail(f"is {short(node.value)} where a name pattern is expected")
    return node.value


def _version(info: Node | None) -> float:
    found = None if info is None else info.find("universal_checkpoint_version")
    if found is None:
        return 0.0
    if isinstance(found.value, bool) or not isinstance(found.value, int | float):
        raise found.fail(f"is {short(found.value)} where a number is expected")
    return float(found.value)


def _fused(info: Node | None) -> list[_Fused]:
    found = None if info is None else info.find(_FUSED)
    return [] if found is None else [_one_fused(entry) for entry in found.items()]


def _one_fused(entry: Node) -> _Fused:
    if isinstance(entry.value, Record):  # the converter's own class instead of its fields
        members = {key: entry.value.get(key) for key in ("patterns", "shape", "partition_dim")}
        entry = Node(members, entry.label, entry.path)
    patterns = tuple(_text(one) for one in entry.at("patterns").items())
    dim = entry.at("partition_dim").count()
    shape = entry.at("shape").items()
    if dim >= len(shape):
        raise entry.fail(f"splits dimension {dim} of a shape with {len(shape)}")
    parts = shape[dim]
    if isinstance(parts.value, list | tuple):
        sizes = parts.shape()
        return _Fused(patterns, dim, sizes, len(sizes))
    count = parts.count()
    if not count:
        raise parts.fail("is 0 where a number of fused parts is expected")
    return _Fused(patterns, dim, None, count)
