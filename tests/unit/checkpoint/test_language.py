"""Which rule takes which parameter, and what it is told when none or several do."""

from __future__ import annotations

import pytest

from orchestrator.checkpoint.language import (
    Average,
    Fragment,
    Padding,
    Renaming,
    Replicated,
    Rule,
    Rules,
    Shard,
    merge,
)
from orchestrator.checkpoint.layout import Box, Chunk, LogicalTensor
from orchestrator.core.errors import CheckpointError

QKV = Rule(r".*\.qkv\.weight", Fragment(0, ("{heads * headDim}", "{kvHeads * headDim}", "{kvHeads * headDim}")))
EMBEDDING = Rule(r"embedding\.weight", Fragment(0), Padding("{vocab}"))
NORM = Rule(r".*norm\.(weight|bias)", Replicated(), optional=True)
RULES = Rules(
    "mine", (QKV, EMBEDDING, NORM), (Renaming(r"layers\.(?P<n>\d+)(?P<rest>\..*)", "layers.{n + first}{rest}"),)
)


def test_exactly_one_rule_takes_a_parameter() -> None:
    assert RULES.match("layers.0.qkv.weight") is QKV
    assert RULES.assign(["embedding.weight", "norm.bias"]) == {"embedding.weight": EMBEDDING, "norm.bias": NORM}


def test_the_whole_name_must_match() -> None:
    with pytest.raises(CheckpointError, match=r"the rules mine .* but embedding\.weight\.x is matched by none"):
        RULES.match("embedding.weight.x")


def test_parameters_that_none_or_several_match_are_listed_with_the_rules() -> None:
    rules = Rules("mine", (QKV, NORM, Rule(r"layers\.0\..*", Replicated())))
    with pytest.raises(
        CheckpointError,
        match=r"0\.qkv\.weight is matched by '\.\*\\\\\.qkv\\\\\.weight' and 'layers.*'; other is matched by none",
    ):
        rules.assign(["layers.0.qkv.weight", "a.norm.weight", "other"])


def test_a_long_list_is_cut() -> None:
    with pytest.raises(CheckpointError, match=r"p4 is matched by none and 7 more: correct"):
        RULES.assign([f"p{index}" for index in range(12)])


def test_rules_that_match_nothing_are_noted_unless_optional() -> None:
    assert RULES.unused(["layers.0.qkv.weight"]) == [
        r"The rule 'embedding\\.weight' of mine matches no parameter of this checkpoint."
    ]


def test_variables_get_the_values_of_the_source() -> None:
    rules = RULES.filled({"heads": 4, "headDim": 2, "kvHeads": 1, "vocab": 50})
    assert rules.match("a.qkv.weight").pattern == Fragment(0, (8, 2, 2))
    assert rules.match("embedding.weight").padded == Padding(50)
    assert rules.notes == ()
    assert rules.names == RULES.names


def test_padding_of_unknown_size_stays_with_a_note() -> None:
    rules = RULES.filled({"heads": 4, "headDim": 2, "kvHeads": 1})
    assert rules.match("embedding.weight").padded is None
    assert rules.notes == (
        "The checkpoint does not say vocab, so that padding beyond it is kept: rules with the number leave it out.",
    )


def test_unknown_sections_are_refused_where_they_matter() -> None:
    rule = RULES.filled({"vocab": 50}).match("a.qkv.weight")
    with pytest.raises(CheckpointError, match=r"a\.qkv\.weight does not fit the rule .* variables that the checkpoint"):
        merge("a.qkv.weight", "a.qkv.weight", None, "parameter", "F32", rule, [Shard((4, 2), ())])


def test_layers_of_a_stage_get_the_numbers_of_the_whole_model() -> None:
    assert RULES.renamed("layers.1.qkv.weight", {"first": 6}) == "layers.7.qkv.weight"
    assert RULES.renamed("embedding.weight", {"first": 6}) == "embedding.weight"
    with pytest.raises(CheckpointError, match="needs first"):
        RULES.renamed("layers.1.qkv.weight", {})


def test_what_rules_did_is_said_in_words() -> None:
    chunk = Chunk(Box.whole((2,)), "f", 0)
    tensors = {
        "a": merge("a", "a", None, "parameter", "F32", Rule("a", Fragment(0), Padding(3)), [Shard((2,), (chunk,))] * 2),
        "a.m": merge("a.m", "a", "m", "state", "F32", Rule("a", Fragment(0)), [Shard((2,), (chunk,))] * 2),
        "b": merge("b", "b", None, "parameter", "F32", Rule("b", Average()), [Shard((2,), (chunk,))] * 3),
        "c": LogicalTensor("c", "c", None, "parameter", "F32", (2,), (chunk,)),
    }
    assert [(one.name, one.rule, len(one.chunks) + len(one.others)) for one in tensors.values() if not one.state] == [
        ("a", "split along dimension 0 in rank order, padding beyond 3 along dimension 0 left out", 2),
        ("b", "the mean of all ranks' copies", 3),
        ("c", None, 1),
    ]
