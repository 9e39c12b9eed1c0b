"""Arithmetic and patterns that may come from a stranger: right, bounded, and never code."""

from __future__ import annotations

import time

import pytest

from orchestrator.checkpoint.expressions import Unknown, compiled, evaluate, number, render
from orchestrator.core.errors import CheckpointError

VALUES = {"heads": 8, "headDim": 16, "kvHeads": 2, "layer": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("heads * headDim", 128),
        ("heads*headDim+2*kvHeads*headDim", 192),
        ("(heads + 2 * kvHeads) * headDim / 4", 48),
        ("10 - 2 - 3", 5),
        ("layer % 2", 1),
        ("100 / 5 / 2", 10),
        ("((1))", 1),
    ],
)
def test_whole_number_arithmetic(text: str, value: int) -> None:
    assert evaluate(text, VALUES) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 +",
        "(1",
        "1)",
        "1 2",
        "heads.x",
        "__import__('os')",
        "2 ** 9",
        "a[0]",
        "+",
        "9" * 19 + " * 99",
        "1.5",
        "²",
    ],
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError):
        evaluate(text, VALUES)


@pytest.mark.parametrize("text", ["heads / 3", "heads / 0", "heads % 0"])
def test_division_is_exact(text: str) -> None:
    with pytest.raises(CheckpointError, match="8 is not divisible by"):
        evaluate(text, VALUES)


def test_an_unknown_variable_is_named() -> None:
    with pytest.raises(Unknown, match="'vocab' needs vocab, which the checkpoint does not say") as raised:
        evaluate("vocab", VALUES)
    assert raised.value.variable == "vocab"


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is not an expression"):
        evaluate("(" * 400 + "1" + ")" * 400, VALUES)
    with pytest.raises(CheckpointError, match="has 2001 characters"):
        evaluate("1" + "+1" * 1000, VALUES)


def test_templates_mix_text_and_arithmetic() -> None:
    groups = {"before": "decoder.layers.", "layer": "3", "rest": ".mlp.weight", "firstLayer": 12}
    assert render("{before}{layer + firstLayer}{rest}", groups) == "decoder.layers.15.mlp.weight"
    assert render("no braces", {}) == "no braces"
    with pytest.raises(Unknown):
        render("{layer + offset}", groups)


def test_counts() -> None:
    assert number(5, {}) == 5
    assert number("{heads * 2}", VALUES) == 16
    assert number("heads", VALUES) == 8


@pytest.mark.parametrize("pattern", ["(", "[a", "a{2,1}", "(?P<x>a)(?P<x>b)", "*"])
def test_an_invalid_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="is not a regular expression"):
        compiled(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|a)*b",
        "(a|aa)+$",
        "(?:a*)*b",
        "((a+))*b",
        "(a?){50}b",
        "(a{1,30}){1,30}b",
        r"(.*)\1",
        "(?P<x>a)(?P=x)",
        ".*.*.*.*.*x",
        "([a-z]+)*x",
        "(x+x+)+y",
        "a?" * 30 + "a" * 30,
        "(?:a|b|ab)" * 20 + "c",
        "a{0,99}" * 9 + "b",
    ],
)
def test_a_pattern_that_may_take_for_ever_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="may take for ever to match"):
        compiled(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d+\.mlp\.dense_h_to_4h\.weight",
        r".*\.layers\.\d+\.(a|b)\.(weight|bias)",
        r"(language_model\.encoder\.layers\.)?\d+\.x",
        r"[*+|(]+\.\(x\)",
        r"^.*self_attn\.q_proj\.weight$",
    ],
)
def test_patterns_as_they_are_written_are_accepted(pattern: str) -> None:
    compiled(pattern)


@pytest.mark.parametrize("pattern", [".*.*.*.*x", "a?" * 21 + "x", ".{0,99}" * 3 + "x", ".*" * 3 + "x?" * 5 + "y"])
def test_the_slowest_accepted_pattern_ends_soon(pattern: str) -> None:
    for length in (20, 60, 200, 1000, 10**5):
        began = time.process_time()
        try:
            assert compiled(pattern).fullmatch("a" * length) is None
        except CheckpointError as error:
            assert "may take for ever to match" in str(error)
        assert time.process_time() - began < 5


def test_names_of_usual_length_are_matched() -> None:
    name = "model.decoder.layers.11.mlp.experts.local_experts.31.linear_fc1.weight"
    assert compiled(r"(.*\.)?layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.(.*)").fullmatch(name)
    with pytest.raises(CheckpointError, match=r"may take for ever to match 'a+' of 5000 characters"):
        compiled(".*.*x").match("a" * 5000)
