"""How often to save: published numbers, bounds, and what it is expected to lose."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.interval import Tier, daly_s, expected_loss, first, save_every, save_tiers, young_s
from orchestrator.core.spec import AutoInterval


@pytest.mark.parametrize(("mtbf_minutes", "minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_daly_as_published(mtbf_minutes: float, minutes: float) -> None:
    """Daly 2006: a dump of 5 minutes."""
    assert daly_s(300, mtbf_minutes * 60) / 60 == pytest.approx(minutes, rel=0.01)


def test_the_first_order_is_young_s() -> None:
    assert young_s(2.0, 10_000.0) == 200.0
    assert daly_s(0.001, 1e6) == pytest.approx(young_s(0.001, 1e6), rel=0.001)


def test_saves_that_take_longer_than_the_job_lives() -> None:
    assert daly_s(500.0, 200.0) == 200.0


@given(st.floats(0.01, 60), st.floats(3600, 1e6), st.floats(0.3, 3))
def test_no_other_interval_loses_clearly_less(stall_s: float, mtbf_s: float, factor: float) -> None:
    tier = Tier(stall_s, 5.0, mtbf_s)
    best = daly_s(stall_s, mtbf_s)
    assert expected_loss(best, tier) <= expected_loss(best * factor, tier) * 1.02


def test_bounds_and_the_time_that_writing_takes() -> None:
    tier = Tier(0.5, 8.0, 6 * 3600.0)
    free = save_every(tier, 1.0, 1e6)
    assert free.seconds == pytest.approx(math.sqrt(2 * 0.5 * 6 * 3600), rel=0.01)
    assert save_every(tier, 300.0, 600.0).seconds == 300.0
    assert save_every(tier, 1.0, 60.0).seconds == 60.0
    assert save_every(Tier(0.5, 400.0, 6 * 3600.0), 1.0, 60.0).seconds == 400.0  # one save at a time
    assert "bounded from 147 s" in save_every(tier, 300.0, 600.0).reason


def test_the_loss_of_a_fixed_interval_is_said_beside_it() -> None:
    found = save_every(Tier(1.0, 10.0, 3600.0), 1.0, 3600.0, compared_s=10.0)
    assert found.loss == pytest.approx(expected_loss(found.seconds, Tier(1.0, 10.0, 3600.0)))
    assert "every 10 s would lose 9.51%" in found.reason


def test_before_the_first_save_nothing_is_known() -> None:
    assert first(AutoInterval()).seconds == 30.0
    assert first(AutoInterval(60.0, 600.0)).seconds == 60.0
    assert first(AutoInterval(1.0, 5.0)).seconds == 5.0


def test_a_nearer_tier_is_written_at_least_as_often() -> None:
    memory, disk = Tier(0.1, 1.0, 3600.0), Tier(10.0, 60.0, 200_000.0)
    near, far = save_tiers([memory, disk], 1.0, 1e6)
    assert near.seconds < far.seconds
    cheap_but_rare = save_tiers([Tier(10.0, 1.0, 1e6), Tier(0.1, 1.0, 3600.0)], 1.0, 1e6)
    assert cheap_but_rare[0].seconds == cheap_but_rare[1].seconds
