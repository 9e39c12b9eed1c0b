"""Failure models draw what they say; a trace has as many nodes away as it says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from orchestrator.core.errors import InvalidInput
from orchestrator.simulation.failures import DAY_S, PRESETS, FailureModel, Kind, draw, preset
from orchestrator.simulation.traces import outages, parse_trace

SECONDS = 54 * DAY_S


def test_the_published_run_has_its_number_of_interruptions() -> None:
    """419 unexpected and 47 planned ones; some drawn fall on nodes that are away already and are left out."""
    drawn = [draw(PRESETS["llama3"], 2048, SECONDS, seed) for seed in range(1, 9)]
    unexpected = [sum(one.kind in (Kind.NODE, Kind.PROCESS) for one in outages) for outages in drawn]
    planned = [sum(one.kind is Kind.MAINTENANCE for one in outages) for outages in drawn]
    assert sum(unexpected) / 8 == pytest.approx(419, rel=0.05)
    assert sum(planned) / 8 == pytest.approx(47, rel=0.15)


@pytest.mark.parametrize(
    ("model", "kind", "expected"),
    [
        (FailureModel(per_1000_node_days=10), Kind.NODE, 10 / 1000 * 200 * 54),
        (FailureModel(job_per_day=3), Kind.PROCESS, 3 * 54),
        (FailureModel(racks_per_1000_days=100, rack_nodes=8, repair_s=600, repair_least_s=1), Kind.RACK, 0.1 * 25 * 54),
        (FailureModel(preemptions_per_node_day=0.1, repair_s=600, repair_least_s=1), Kind.PREEMPTION, 0.1 * 200 * 54),
        (FailureModel(maintenance_per_day=4), Kind.MAINTENANCE, 4 * 54),
    ],
)
def test_rates(model: FailureModel, kind: Kind, expected: float) -> None:
    counts = [Counter(one.kind for one in draw(model, 200, SECONDS, seed)) for seed in range(1, 6)]
    assert all(set(one) == {kind} for one in counts)
    assert sum(one[kind] for one in counts) / 5 == pytest.approx(expected, rel=0.1)


def test_repairs_have_their_mean_and_never_less_than_the_least() -> None:
    model = FailureModel(per_1000_node_days=50, repair_s=7200, repair_least_s=900)
    lengths = [one.end_s - one.start_s for one in draw(model, 500, SECONDS, 1)]
    assert min(lengths) >= 900
    assert sum(lengths) / len(lengths) == pytest.approx(7200, rel=0.1)


def test_lemons_fail_more_often_and_all_together_as_often() -> None:
    model = FailureModel(per_1000_node_days=50, lemons=0.02, lemon_factor=20, repair_s=600, repair_least_s=1)
    drawn = draw(model, 500, SECONDS, 3)
    counts = Counter(one.nodes[0] for one in drawn)
    assert len(drawn) == pytest.approx(50 / 1000 * 500 * 54, rel=0.1)
    worst = sum(count for _, count in counts.most_common(10))
    assert worst / len(drawn) == pytest.approx(20 * 10 / (490 + 20 * 10), rel=0.15)


def test_a_rack_goes_as_one_and_nobody_fails_while_away() -> None:
    drawn = draw(replace(PRESETS["racks"], racks_per_1000_days=50), 100, SECONDS, 1)
    racks = [one for one in drawn if one.kind is Kind.RACK]
    assert racks and all(len(one.nodes) == 16 or one.nodes[-1] == 99 for one in racks)
    back: dict[int, float] = {}
    for one in drawn:
        assert all(back.get(node, 0) <= one.start_s for node in one.nodes)
        back |= dict.fromkeys(one.nodes, one.end_s)


def test_racks_that_are_told_go_as_one() -> None:
    model = FailureModel(racks_per_1000_days=100, repair_s=600, repair_least_s=1)
    told = [(0, 3), (1, 2, 4)]
    assert {one.nodes for one in draw(model, 5, SECONDS, 1, told)} == set(told)
    assert draw(model, 32, SECONDS, 1) == draw(model, 32, SECONDS, 1, [tuple(range(16)), tuple(range(16, 32))])


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    assert draw(PRESETS["rsc1"], 100, SECONDS, 5) == draw(PRESETS["rsc1"], 100, SECONDS, 5)
    assert draw(PRESETS["rsc1"], 100, SECONDS, 5) != draw(PRESETS["rsc1"], 100, SECONDS, 6)


def test_an_unknown_model_is_named_with_those_there_are() -> None:
    with pytest.raises(InvalidInput, match="no failure model 'llama4': choose one of llama3, rsc1"):
        preset("llama4")


TRACE = "t_s,available_nodes\n0,3\n100,5\n200,1\n250,2\n400,9\n"


def test_a_trace_is_a_step_function() -> None:
    steps = parse_trace(TRACE, "trace.csv")
    assert steps == [(0.0, 3), (100.0, 5), (200.0, 1), (250.0, 2), (400.0, 9)]
    away = outages(steps, 6, 1000.0, 1)

    def here(at: float) -> int:
        return 6 - sum(one.start_s <= at < one.end_s for one in away)

    assert [here(at) for at in (0, 99, 100, 199, 200, 249, 250, 399, 400, 999)] == [3, 3, 5, 5, 1, 1, 2, 2, 6, 6]


def test_devices_of_a_trace_are_whole_nodes() -> None:
    assert parse_trace("t_s,available_gpus\n0,17\n", "gpus.csv", devices_per_node=8) == [(0.0, 2)]
    assert parse_trace("t_s,op,node,nodes_after\n5,add,a,1\n", "bamboo.csv") == [(5.0, 1)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "trace.csv has no columns t_s"),
        ("t_s,nodes\n0,1\n", "has no columns t_s and one of available_nodes"),
        ("t_s,available_nodes\n0,1\nx,2\n", "trace.csv, line 3: t_s is 'x'"),
        ("t_s,available_nodes\n0,-1\n", "line 2: available_nodes is '-1'"),
        ("t_s,available_nodes\n5,1\n3,2\n", "line 3: t_s 3 is before 5"),
    ],
)
def test_a_trace_that_is_none(text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        parse_trace(text, "trace.csv")
