"""The universal checkpoint language: rules that say how the pieces of model-parallel ranks make one tensor.

A rule matches parameter names with a regular expression and says what every rank's piece is; exactly one rule must
match each parameter. After the patterns of the Universal Checkpointing paper (arXiv 2406.18820).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.checkpoint.layout import Chunk, LogicalTensor


@dataclass(frozen=True, slots=True)
class Rule:
    """What the pieces of the parameters that `pattern` (a regular expression, whole name) matches are."""

    pattern: str
    kind: str


@dataclass(frozen=True, slots=True)
class Rules:
    """A rule set: name and rules."""

    name: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """What one model-parallel rank holds of a tensor: chunks whose boxes count from the shard's own first element."""

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def merge(name: LogicalTensor, rule: Rule, shards: Sequence[Shard]) -> LogicalTensor:
    """Placeholder until the language is written."""
    raise NotImplementedError
