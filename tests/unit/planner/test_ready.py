"""What was searched ahead is what a search finds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core.types import NodeCapacity
from orchestrator.planner import Planned, Ready, choose, ladder, plan
from orchestrator.planner.calibration import Calibration
from tests.unit.planner.jobs import LLAMA_8B, job, nodes, planned

SPEC = job(LLAMA_8B, global_batch=512)
CAPACITY = nodes(8, 8, "h100")


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Devices of each search that is made."""
    made: list[int] = []
    search = choose.fastest

    def counted(space: object, *rest: object) -> None:
        made.append(space.pool.devices)  # type: ignore[attr-defined]
        search(space, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(choose, "fastest", counted)
    return made


def test_a_loss_that_the_ladder_foresaw_needs_no_search(searches: list[int]) -> None:
    ready = Ready()
    first = planned(SPEC, CAPACITY, ready=ready)
    rungs = ladder(SPEC, CAPACITY, first, 3, ready=ready)
    searches.clear()
    left = [node for node in CAPACITY if node.node not in ("node-2", "node-5")]
    found = plan(SPEC, left, first.plan, first.assignment, ready=ready)
    assert searches == []
    assert isinstance(found, Planned) and isinstance(rungs[1], Planned)
    assert found.plan == rungs[1].plan
    anew = planned(SPEC, left, first.plan, first.assignment)
    assert replace(found, weighed=0) == replace(anew, weighed=0)
    assert {"node-2", "node-5"}.isdisjoint(found.assignment.names)


def test_other_kinds_of_nodes_are_searched_anew(searches: list[int]) -> None:
    ready = Ready()
    planned(SPEC, CAPACITY, ready=ready)
    searches.clear()
    others: list[list[NodeCapacity]] = [
        nodes(8, 8, "a100"),
        nodes(8, 4, "h100"),
        nodes(7, 8, "h100"),
        [*CAPACITY[1:], replace(CAPACITY[0], speed=0.5)],
        nodes(8, 8, "h100", memory_bytes=60 << 30),
    ]
    for other in others:
        searches.clear()
        assert planned(SPEC, other, ready=ready) == planned(SPEC, other)
        assert searches[: len(searches) // 2] == searches[len(searches) // 2 :] != []


def test_what_was_measured_since_makes_all_old(searches: list[int]) -> None:
    ready = Ready()
    planned(SPEC, CAPACITY, ready=ready)
    searches.clear()
    learnt = Calibration().observe("h100", 1, 1, 2.0, 1.0)
    assert planned(SPEC, CAPACITY, calibration=learnt, ready=ready) == planned(SPEC, CAPACITY, calibration=learnt)
    assert len(ready) == 1 and searches != []


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.planner.ready.KEPT", 3)
    ready = Ready()
    for count in range(1, 6):
        planned(SPEC, nodes(count, 8, "h100"), ready=ready)
    assert len(ready) == 3
