"""What rules are written in: names' regular expressions and whole-number arithmetic over variables. Pure.

Both may come out of a stranger's checkpoint, so neither can run code or run for ever.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.core.errors import CheckpointError

MAX_PATTERN = 1000
"""Characters of a regular expression or template."""
MAX_REPEATS = 4
"""Unbounded repeats in one regular expression: matching takes at most (length of the name) to this power."""
MAX_STEPS = 3_000_000
"""Ways in which one expression may have to be laid over one name: a few hundredths of a second."""
LARGEST = 2**63 - 1

_UNBOUNDED = re.compile(r"[*+]|\{\d*,\}")
_BRACES = re.compile(r"\{([^{}]*)\}")
_TOKEN = re.compile(r"\s*(?:(\d{1,19})|([A-Za-z_]\w*)|([-+*/%()]))")


class Unknown(CheckpointError):
    """A variable that has no value; `variable` is its name."""

    def __init__(self, variable: str, text: str) -> None:
        super().__init__(f"{text!r} needs {variable}, which the checkpoint does not say: give it with the rules")
        self.variable = variable


@dataclass(frozen=True, slots=True)
class Expression:
    """A regular expression that is matched only against names that are short enough for it."""

    regular: re.Pattern[str]
    ways: int
    """Ways to choose among its alternatives, options and bounded repeats."""
    repeats: int
    """Its unbounded repeats."""

    def match(self, name: str) -> re.Match[str] | None:
        """As `re.Pattern.match`; raises `CheckpointError` for a name for which it may take for ever."""
        self._require_short(name)
        return self.regular.match(name)

    def fullmatch(self, name: str) -> re.Match[str] | None:
        """As `re.Pattern.fullmatch`; raises `CheckpointError` for a name for which it may take for ever."""
        self._require_short(name)
        return self.regular.fullmatch(name)

    def _require_short(self, name: str) -> None:
        if self.ways * math.comb(len(name) + self.repeats, self.repeats) > MAX_STEPS:
            raise CheckpointError(
                f"the pattern {self.regular.pattern!r} may take for ever to match {name[:100]!r} of {len(name)} "
                "characters: write a simpler one"
            )


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str) -> Expression:
    """The regular expression; raises `CheckpointError` for one that is invalid or may take for ever to match."""
    if len(pattern) > MAX_PATTERN:
        raise CheckpointError(f"the pattern {pattern[:50]!r}... has {len(pattern)} characters: write a shorter one")
    try:
        found = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"the pattern {pattern!r} is not a regular expression ({error}): correct it") from error
    plain = re.sub(r"\\.", "_", pattern, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "_", plain)
    ways = _ways(plain)
    reason = _slow(pattern, plain) or (f"it has {ways} ways to match" if ways > MAX_STEPS else None)
    if reason is not None:
        raise CheckpointError(f"the pattern {pattern!r} may take for ever to match ({reason}): write a simpler one")
    return Expression(found, ways, len(re.findall(_UNBOUNDED, plain)))


def _ways(plain: str) -> int:
    """In how many ways its alternatives, options and bounded repeats can be chosen, at most."""
    open_groups = [[0, 1]]  # the alternatives that are complete, and the one that is being read
    for at, character in enumerate(plain):
        now = open_groups[-1]
        if character == "(":
            open_groups.append([0, 1])
        elif character == "|":
            now[:] = [sum(now), 1]
        elif character == ")" and len(open_groups) > 1:
            open_groups.pop()
            open_groups[-1][1] *= sum(now)
        elif character == "?" and plain[at - 1 : at] not in ("(", "*", "+", "?", "}"):
            now[1] *= 2
        elif bounds := re.compile(r"\{(\d*),(\d+)\}").match(plain, at):
            now[1] *= max(1, int(bounds[2][:9]) - int(bounds[1][:9] or 0) + 1)
        if now[1] > MAX_STEPS:
            return now[1]
    return sum(sum(group) for group in open_groups)


def _slow(pattern: str, plain: str) -> str | None:
    """Why a backtracking matcher may need exponential time; None when it cannot."""
    if re.search(r"\(\?P=|\\[1-9]", pattern):
        return "it refers back to a group"
    unbounded = len(re.findall(_UNBOUNDED, plain))
    if unbounded > MAX_REPEATS:
        return f"it has {unbounded} unbounded repeats"
    ambiguous = [False]  # per open group: whether it can match one text in several ways
    for at, character in enumerate(plain):
        if character == "(":
            ambiguous.append(False)
        elif character == ")" and len(ambiguous) > 1:
            inner = ambiguous.pop()
            if inner and re.match(r"[*+]|\{", plain[at + 1 : at + 2]):
                return "a group that repeats or chooses is itself repeated"
            ambiguous[-1] = ambiguous[-1] or inner
        elif character in "*+{|" or (character == "?" and plain[at - 1 : at] != "("):
            ambiguous[-1] = True
    return None


def evaluate(text: str, values: Mapping[str, int]) -> int:
    """The whole number that `text` stands for: numbers, variables, `+ - * / %` and parentheses; `/` must be exact.

    Raises `Unknown` for a variable without a value, `CheckpointError` for anything else that is not such a number.
    """
    if len(text) > MAX_PATTERN:
        raise CheckpointError(f"the expression {text[:50]!r}... has {len(text)} characters: write a shorter one")
    return _Sum(text, values).result()


def render(template: str, values: Mapping[str, int | str]) -> str:
    """`template` with every `{expression}` replaced by its value; `{name}` alone may also be text."""

    def fill(match: re.Match[str]) -> str:
        name = match[1].strip()
        if isinstance(values.get(name), str):
            return str(values[name])
        return str(evaluate(match[1], numbers))

    numbers = {name: number for name, value in values.items() if (number := _number(value)) is not None}
    return _BRACES.sub(fill, template)


def number(value: int | str, values: Mapping[str, int]) -> int:
    """A count that is written as a number or as one `{expression}`."""
    if isinstance(value, int):
        return value
    whole = _BRACES.fullmatch(value.strip())
    return evaluate(whole[1] if whole else value, values)


def _number(value: int | str) -> int | None:
    if isinstance(value, int):
        return value
    return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else None


class _Sum:
    """A recursive-descent reader of one expression; depth is bounded by its length."""

    def __init__(self, text: str, values: Mapping[str, int]) -> None:
        self.text, self.values = text, values
        self.tokens: list[str] = []
        at = 0
        while text[at:].strip():
            token = _TOKEN.match(text, at)
            if token is None:
                raise self.wrong()
            self.tokens.append(token[0].strip())
            at = token.end()
        if self.tokens.count("(") > 50:
            raise self.wrong()
        self.tokens.reverse()

    def wrong(self) -> CheckpointError:
        return CheckpointError(f"{self.text!r} is not an expression of whole numbers: write, for example, heads * 64")

    def result(self) -> int:
        value = self.sum()
        if self.tokens:
            raise self.wrong()
        return value

    def sum(self) -> int:
        value = self.product()
        while self.tokens and self.tokens[-1] in "+-":
            sign = 1 if self.tokens.pop() == "+" else -1
            value = self.bounded(value + sign * self.product())
        return value

    def product(self) -> int:
        value = self.atom()
        while self.tokens and self.tokens[-1] in "*/%":
            sign = self.tokens.pop()
            other = self.atom()
            if sign == "*":
                value = self.bounded(value * other)
            elif other == 0 or (sign == "/" and value % other):
                raise CheckpointError(f"{self.text!r}: {value} is not divisible by {other}; correct the rule's numbers")
            else:
                value = value // other if sign == "/" else value % other
        return value

    def atom(self) -> int:
        word = self.tokens.pop() if self.tokens else ""
        if word == "(":
            value = self.sum()
            if not self.tokens or self.tokens.pop() != ")":
                raise self.wrong()
            return value
        if word.isdigit():
            return self.bounded(int(word))
        if not word.isidentifier():
            raise self.wrong()
        if word not in self.values:
            raise Unknown(word, self.text)
        return self.bounded(self.values[word])

    def bounded(self, value: int) -> int:
        if abs(value) > LARGEST:
            raise self.wrong()
        return value
