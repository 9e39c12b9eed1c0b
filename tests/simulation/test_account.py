"""The closed form of a stretch of training against living through it second by second."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.simulation.account import CAUSES, Account, Stretch

TICK_S = 1.0


def lived(elapsed: int, every: int, stall: int, write: int) -> tuple[int, int]:
    """(Seconds trained, seconds trained before the last committed save), one by one."""
    trained = kept = since = 0
    stalled = 0
    writing: list[tuple[int, int]] = []
    for now in range(1, elapsed + 1):
        if stalled:
            stalled -= 1
            if not stalled:
                writing.append((now + write, trained))
        else:
            trained, since = trained + 1, since + 1
            if since == every:
                since, stalled = 0, stall
        kept = max([kept, *(what for at, what in writing if at <= now)])
    return trained, kept


@given(st.integers(0, 400), st.integers(5, 60), st.integers(1, 5), st.integers(0, 40))
def test_a_stretch_is_what_living_through_it_is(elapsed: int, every: int, stall: int, write: int) -> None:
    stretch = Stretch(elapsed, every, stall, write)
    assert (stretch.trained_s, stretch.kept_s) == lived(elapsed, every, stall, write)


@given(st.floats(0, 1e6), st.floats(10, 1e4), st.floats(0, 5), st.floats(0, 100), st.floats(0.1, 1), st.booleans())
def test_nothing_gets_lost_and_nothing_is_counted_twice(
    elapsed: float, every: float, stall: float, write: float, speed: float, graceful: bool
) -> None:
    account = Account()
    account.train(Stretch(elapsed, every, stall, write), speed, (1 - speed) / 3, graceful=graceful)
    assert account.total_s == pytest.approx(elapsed, abs=1e-6)
    assert all(seconds >= -1e-6 for seconds in account.seconds.values())
    assert set(account.seconds) == set(CAUSES)


def test_goodput_and_ettr() -> None:
    account = Account()
    account.spend("useful", 60)
    account.spend("degraded capacity", 20)
    account.spend("restart", 20)
    assert (account.goodput, account.ettr) == (0.6, 0.8)
    assert sum(account.shares().values()) == pytest.approx(1)
