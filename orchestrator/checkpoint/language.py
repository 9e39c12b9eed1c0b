"""The universal checkpoint language: rules that say how the pieces of model-parallel ranks make one tensor.

A rule matches parameter names with a regular expression and says what every rank's piece is; exactly one rule must
match each parameter. After the patterns of the Universal Checkpointing paper (arXiv 2406.18820), section 3. Rules are
data: `rulefile` reads them from YAML, formats make them of what a checkpoint says about itself. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from orchestrator.checkpoint.expressions import Unknown, compiled, render
from orchestrator.checkpoint.merging import Shard, cut, merge
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
from orchestrator.core.errors import CheckpointError

__all__ = [
    "Average",
    "Expert",
    "Flat",
    "Fragment",
    "Padding",
    "Pattern",
    "Renaming",
    "Replicated",
    "Rule",
    "Rules",
    "Shard",
    "Unique",
    "cut",
    "merge",
]

SHOWN = 5
"""Parameters, or rules, that one error lists."""


@dataclass(frozen=True, slots=True)
class Rules:
    """A rule set."""

    name: str
    rules: tuple[Rule, ...]
    names: tuple[Renaming, ...] = ()
    """How names of ranks become names of the whole model, each applied to the result of those before it. `rules` match
    the names of the whole model."""
    notes: tuple[str, ...] = ()
    """What was left open when variables got their values; whole sentences."""

    def match(self, parameter: str) -> Rule:
        """The one rule for a parameter, by its name in the source; raises `CheckpointError` for none or several."""
        fitting = self._fitting(parameter)
        if len(fitting) != 1:
            raise self._unclear([(parameter, fitting)])
        return fitting[0]

    def assign(self, parameters: Iterable[str], where: str = "") -> dict[str, Rule]:
        """The rule of each parameter; raises one `CheckpointError` that lists those that none or several match.

        `where` is how the error names the checkpoint.
        """
        fitting = {parameter: self._fitting(parameter) for parameter in parameters}
        unclear = [(parameter, rules) for parameter, rules in fitting.items() if len(rules) != 1]
        if unclear:
            raise self._unclear(unclear, f" of {where}" if where else "")
        return {parameter: rules[0] for parameter, rules in fitting.items()}

    def unused(self, parameters: Iterable[str]) -> list[str]:
        """A note (a whole sentence) for each rule that matches none of the parameters."""
        names = list(parameters)
        return [
            f"The rule {rule.match!r} of {self.name} matches no parameter of this checkpoint."
            for rule in self.rules
            if not rule.optional and not any(compiled(rule.match).fullmatch(name) for name in names)
        ]

    def renamed(self, parameter: str, values: Mapping[str, int]) -> str:
        """The parameter's name in the whole model.

        `values` are the variables of the rank that holds it, for example `{"firstLayer": 6}`; raises `CheckpointError`
        when one is missing.
        """
        for renaming in self.names:
            found = compiled(renaming.match).fullmatch(parameter)
            if found is not None:
                groups = {key: text for key, text in found.groupdict().items() if text is not None}
                parameter = render(renaming.name, {**values, **groups})
        return parameter

    def filled(self, values: Mapping[str, int]) -> Rules:
        """The rules with numbers in place of variables.

        Padding whose size is unknown stays in the tensor, with a note. A fragment with unknown sections keeps its
        variables, and is refused by `merge` if it matches anything.
        """
        rules, notes = [], list(self.notes)
        for rule in self.rules:
            try:
                rules.append(rule.filled(values))
            except Unknown as missing:
                rules.append(rule)
                if rule.padded is not None:
                    rules[-1] = self._without_padding(rule, values)
                    notes.append(
                        f"The checkpoint does not say {missing.variable}, so that padding beyond it is kept: "
                        "rules with the number leave it out."
                    )
        return Rules(self.name, tuple(rules), self.names, tuple(dict.fromkeys(notes)))

    def _without_padding(self, rule: Rule, values: Mapping[str, int]) -> Rule:
        bare = replace(rule, padded=None)
        try:
            return bare.filled(values)
        except Unknown:
            return bare

    def _fitting(self, parameter: str) -> list[Rule]:
        return [rule for rule in self.rules if compiled(rule.match).fullmatch(parameter)]

    def _unclear(self, unclear: list[tuple[str, list[Rule]]], where: str = "") -> CheckpointError:
        words = []
        for parameter, rules in unclear[:SHOWN]:
            fighting = " and ".join(repr(rule.match) for rule in rules[:SHOWN])
            words.append(f"{parameter} is matched by {fighting or 'none'}")
        more = f" and {len(unclear) - SHOWN} more" if len(unclear) > SHOWN else ""
        return CheckpointError(
            f"the rules {self.name} must match every parameter{where} exactly once, but {'; '.join(words)}{more}: "
            "correct the rules or give others"
        )
