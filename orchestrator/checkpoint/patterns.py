"""What the piece of a parameter that one rank holds can be: the words of the universal checkpoint language. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.checkpoint.expressions import number

Count = int | str
"""A number, or an expression of variables in braces such as `{heads * headDim}`."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank holds the whole tensor, equal everywhere."""

    def __str__(self) -> str:
        return "the same on every rank: the first rank's copy"


@dataclass(frozen=True, slots=True)
class Average:
    """Every rank holds the whole tensor, each with its own values; the tensor is their mean."""

    def __str__(self) -> str:
        return "the mean of all ranks' copies"


@dataclass(frozen=True, slots=True)
class Unique:
    """Exactly one rank holds it."""

    def __str__(self) -> str:
        return "whole on one rank alone"


@dataclass(frozen=True, slots=True)
class Fragment:
    """The tensor is split over the ranks along `dim`, in rank order; each section of it on its own."""

    dim: int = 0
    """Negative counts from the end."""
    sections: tuple[Count, ...] = ()
    """Sizes along `dim`, in the whole tensor's elements, of the tensors that are fused in it (q, k, v); () = one."""
    count: int = 1
    """Number of equal sections, where `sections` is empty (gate and up of SwiGLU: 2)."""
    widths: tuple[tuple[int, ...], ...] = ()
    """Per section, the size that each rank holds of it; () = in proportion to the ranks' shards."""

    def __str__(self) -> str:
        words = f"split along dimension {self.dim} in rank order"
        if self.sections:
            words += f", each of the sections {', '.join(map(str, self.sections))} on its own"
        elif self.count > 1:
            words += f", each of {self.count} equal sections on its own"
        if self.widths:
            words += "; ranks hold " + " and ".join("+".join(map(str, section)) for section in self.widths)
        return words


@dataclass(frozen=True, slots=True)
class Flat:
    """Ranks hold consecutive parts of the flattened tensor (ZeRO); what goes beyond its end is padding."""

    def __str__(self) -> str:
        return "flattened, and cut into one part per rank"


@dataclass(frozen=True, slots=True)
class Expert:
    """Experts lie along `dim`; each expert-parallel rank holds the next few of them."""

    dim: int = 0

    def __str__(self) -> str:
        return f"experts along dimension {self.dim}, the next few on each expert-parallel rank"


Pattern = Replicated | Average | Unique | Fragment | Flat | Expert


@dataclass(frozen=True, slots=True)
class Padding:
    """Once merged, what lies beyond index `to` along `dim` is padding and is left out."""

    to: Count
    dim: int = 0

    def __str__(self) -> str:
        return f"padding beyond {self.to} along dimension {self.dim} left out"


@dataclass(frozen=True, slots=True)
class Rule:
    """What the pieces of the parameters whose whole name `match` (a regular expression) matches are."""

    match: str
    pattern: Pattern
    padded: Padding | None = None
    optional: bool = False
    """Not every model of the kind has such parameters: that it matches none is not worth a note."""

    def __str__(self) -> str:
        return str(self.pattern) if self.padded is None else f"{self.pattern}, {self.padded}"

    def filled(self, values: Mapping[str, int]) -> Rule:
        """The rule with numbers in place of variables; raises `Unknown` for a variable that has no value."""
        pattern, padded = self.pattern, self.padded
        if isinstance(pattern, Fragment) and pattern.sections:
            pattern = replace(pattern, sections=tuple(number(size, values) for size in pattern.sections))
        if padded is not None:
            padded = replace(padded, to=number(padded.to, values))
        return replace(self, pattern=pattern, padded=padded)


@dataclass(frozen=True, slots=True)
class Renaming:
    """How a parameter is named in the whole model where the ranks of a pipeline stage count layers from their own
    first one (`stage`), or the ranks of an expert group their experts (`expert`).
    """

    match: str
    """Whole names, with named groups."""
    name: str
    """A template: `{...}` is arithmetic over the named groups and the rank's variables; `{group}` alone is its text."""
