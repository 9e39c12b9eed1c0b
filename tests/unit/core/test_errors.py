"""Messages stay one printable line, whatever a stranger called his tensors."""

from __future__ import annotations

from orchestrator.core.errors import MAX_MESSAGE, CheckpointError, printable


def test_what_moves_the_cursor_is_shown_as_an_escape() -> None:
    error = CheckpointError("tensor \x1b[2Ja\nb\0 é is damaged")
    assert str(error) == r"tensor \x1b[2Ja\nb\x00 é is damaged"
    assert printable("\u202e\ud800") == r"\u202e\ud800"


def test_a_long_name_is_cut_and_the_advice_stays() -> None:
    text = str(CheckpointError(f"{'x' * 10_000} is damaged: take another"))
    assert len(text) <= MAX_MESSAGE and text.endswith("is damaged: take another")
