"""Rules from YAML: what they say, and files that say something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.checkpoint import rulefile
from orchestrator.checkpoint.patterns import (
    Average,
    Expert,
    Flat,
    Fragment,
    Padding,
    Renaming,
    Replicated,
    Rule,
    Unique,
)
from orchestrator.core.errors import InvalidInput

EVERYTHING = r"""
name: everything
description: one of each
names:
  - {match: 'layers\.(?P<n>\d+)', stage: 'layers.{n + firstLayer}'}
  - {match: 'experts\.(?P<n>\d+)', expert: 'experts.{n + firstExpert}'}
rules:
  - {match: a, replicated: }
  - {match: b, average: {}}
  - {match: c, unique: , optional: true}
  - {match: d, flat: }
  - {match: e, expert: {dim: 1}}
  - {match: f, fragment: }
  - {match: g, fragment: {dim: -1, sections: ['{heads * 2}', 4], widths: [[2, 2], [3, 1]]}, padded: {to: 7, dim: 1}}
  - {match: h, fragment: {count: 2}}
"""


def test_everything_that_can_be_said() -> None:
    rules = rulefile.parse(EVERYTHING.encode(), "here")
    assert rules.name == "everything"
    assert rules.names == (
        Renaming(r"layers\.(?P<n>\d+)", "layers.{n + firstLayer}"),
        Renaming(r"experts\.(?P<n>\d+)", "experts.{n + firstExpert}"),
    )
    assert rules.rules == (
        Rule("a", Replicated()),
        Rule("b", Average()),
        Rule("c", Unique(), optional=True),
        Rule("d", Flat()),
        Rule("e", Expert(1)),
        Rule("f", Fragment()),
        Rule("g", Fragment(-1, ("{heads * 2}", 4), 1, ((2, 2), (3, 1))), Padding(7, 1)),
        Rule("h", Fragment(count=2)),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rules here is no mapping"),
        ("- a", "rules here is no mapping"),
        ("name: [", "rules here are not YAML"),
        ("name: x\nname: y\nrules: []", "line 1 repeats a key"),
        ("name: x\nrule: []", "has the unknown key 'rule' (known are description, name, names, rules)"),
        ("rules: []", "rules here has no text under name"),
        ("name: x", "rules here hold no rules"),
        ("name: x\nrules: {a: b}", "has no list of at most 1000 items under rules"),
        ("name: x\nrules: [a]", "rule 1 of here is no mapping"),
        ("name: x\nrules: [{fragment: }]", "rule 1 of here has no text under match"),
        ("name: x\nrules: [{match: a}]", "rule 1 of here (a) must have exactly one of replicated"),
        ("name: x\nrules: [{match: a, flat: , unique: }]", "but has unique and flat"),
        ("name: x\nrules: [{match: '(', flat: }]", "rule 1 of here: the pattern '(' is not a regular expression"),
        ("name: x\nrules: [{match: '(a+)+', flat: }]", "may take for ever to match"),
        ("name: x\nrules: [{match: a, flat: {dim: 1}}]", "flat of rule 1 of here has the unknown key 'dim'"),
        (
            "name: x\nrules: [{match: a, fragment: {dim: x}}]",
            "fragment of rule 1 of here has no whole number",
        ),
        ("name: x\nrules: [{match: a, fragment: {sections: [-1]}}]", "neither a count nor an expression"),
        ("name: x\nrules: [{match: a, fragment: {sections: [1.5]}}]", "neither a count nor an expression"),
        ("name: x\nrules: [{match: a, fragment: {sections: 3}}]", "no list of at most 1000 items under sections"),
        ("name: x\nrules: [{match: a, fragment: {count: 0}}]", "a count below 1"),
        ("name: x\nrules: [{match: a, fragment: {count: 2, sections: [1]}}]", "both sections and count"),
        ("name: x\nrules: [{match: a, fragment: {widths: [1]}}]", "under widths no list of sizes"),
        ("name: x\nrules: [{match: a, flat: , optional: 1}]", "neither true nor false under optional"),
        ("name: x\nrules: [{match: a, flat: , padded: {}}]", "padded of rule 1 of here has under to neither"),
        (
            "name: x\nnames: [{match: a}]\nrules: [{match: a, flat: }]",
            "name 1 of here must have either stage or",
        ),
        ("name: !!python/object/apply:os.system [id]\nrules: []", "are not YAML"),
        ("a: &a [x]\nname: x\nrules: [*a, *a]", "it has an alias"),
        ("{[a]: b}", "are not YAML"),
        ("name: x\nrules: " + "[" * 3000, "are not YAML"),
        ("name: x\nrules: " + "9" * 6000, "rules here"),
    ],
)
def test_a_file_that_says_something_else(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        rulefile.parse(text.encode(), "here")
    assert message in str(raised.value)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(InvalidInput, match="are not YAML"):
        rulefile.parse(b"\xff\xfe\x00\xd8", "here")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "big.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidInput, match="more than 262144 bytes"):
        rulefile.load(tmp_path / "big.yaml")


def test_by_name_or_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(EVERYTHING)
    assert rulefile.named(str(path)).name == "everything"
    assert rulefile.named("huggingface-llama").name == "huggingface-llama"
    with pytest.raises(InvalidInput, match=r"there are no rules 'llama': give a file, or one of huggingface-gpt2"):
        rulefile.named("llama")
    with pytest.raises(InvalidInput, match="cannot be read"):
        rulefile.load(tmp_path)
