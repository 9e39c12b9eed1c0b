"""The planner's entries: enumerate, weigh, choose, assign, explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import Assignment, Mesh, NodeCapacity, Plan
from orchestrator.planner import shares, shortage
from orchestrator.planner.assign import assign
from orchestrator.planner.calibration import Calibration
from orchestrator.planner.choose import Choice, Search, choose
from orchestrator.planner.estimate import Estimate, estimates
from orchestrator.planner.explain import compared, lost, why
from orchestrator.planner.frontier import LISTED, Ranking, Wish
from orchestrator.planner.judge import SHARES, SLOW_FIRST, judge
from orchestrator.planner.legality import legal
from orchestrator.planner.outcome import Candidate, Infeasible, Planned
from orchestrator.planner.pool import Pool, pools, usable
from orchestrator.planner.ready import Ready
from orchestrator.planner.space import KEPT, Space, candidates


class Placed(Protocol):
    """Something that runs, or could: a `Planned`, a generation."""

    @property
    def plan(self) -> Plan:
        """Its plan."""

    @property
    def assignment(self) -> Assignment:
        """Where its ranks are."""


def plan(
    spec: JobSpec,
    capacity: Sequence[NodeCapacity],
    previous: Plan | None = None,
    assignment: Assignment | None = None,
    calibration: Calibration | None = None,
    ready: Ready | None = None,
) -> Planned | Infeasible:
    """The best legal plan of `spec` on the nodes of `capacity`, or why there is none.

    `previous` is the plan that ran last: its mesh is kept while nothing is clearly better. `assignment` is where it
    ran: its nodes are preferred and keep their order. `calibration` is what was learnt from measured steps; `ready`
    keeps what was searched, for the same job only. The order of `capacity` does not matter.
    """
    nodes = usable(spec, capacity)
    hopeless = shortage.before_search(spec, nodes)
    if hopeless is not None:
        return hopeless
    search = _search(spec, pools(spec, nodes), calibration)
    ranking = search.ranked(Wish()) if ready is None else ready.ranked(search)
    return _answer(search, nodes, ranking, previous, assignment)


def ladder(
    spec: JobSpec,
    capacity: Sequence[NodeCapacity],
    planned: Placed,
    count: int,
    calibration: Calibration | None = None,
    ready: Ready | None = None,
) -> tuple[Planned | Infeasible, ...]:
    """The plans after 1, 2 ... `count` of the nodes that `planned` uses are lost at once, its last ones first.

    Nodes of one kind are alike to the planner, so that a rung holds whichever of them are lost. Ends before the first
    rung with no nodes left. Each rung is what `plan` answers, but most of the search is shared; with `ready` a later
    `plan` on so many nodes needs none.
    """
    names = planned.assignment.names
    rungs: list[Planned | Infeasible] = []
    below: tuple[Search, Ranking] | None = None
    for losses in range(min(count, len(names)), 0, -1):
        gone = set(names[-losses:])
        nodes = usable(spec, [node for node in capacity if node.node not in gone])
        hopeless = shortage.before_search(spec, nodes)
        if hopeless is not None:
            rungs.append(hopeless)
            continue
        search = _search(spec, pools(spec, nodes), calibration)
        ranking = (ready.find(search) if ready else None) or _above(search, below)
        if ready is not None:
            ready.keep(search, ranking)
        rungs.append(_answer(search, nodes, ranking, planned.plan, planned.assignment))
        below = search, ranking
    return tuple(reversed(rungs))


def _above(search: Search, below: tuple[Search, Ranking] | None) -> Ranking:
    """The ranking of `search`, given that of one with fewer nodes: only plans on more devices than that are new."""
    if below is None:
        return search.ranked(Wish())
    fewer, known = below
    alike = all(len(one.spaces) == 1 and one.spaces[0].pool.alike for one in (search, fewer))
    if not alike or search.spaces[0].pool.machine != fewer.spaces[0].pool.machine:
        return search.ranked(Wish())
    return search.ranked(Wish(devices=fewer.spaces[0].pool.devices + 1), known)


def _answer(
    search: Search,
    nodes: Sequence[NodeCapacity],
    ranking: Ranking,
    previous: Plan | None,
    assignment: Assignment | None,
) -> Planned | Infeasible:
    if not len(ranking):
        return shortage.explained(nodes, search, lambda spec, nodes: _best_mesh(spec, nodes, search.calibration))
    choice = choose(search, ranking, previous.mesh if previous else None)
    return _planned(search, nodes, ranking, choice, assignment)


def _search(spec: JobSpec, candidates: Sequence[Pool], calibration: Calibration | None) -> Search:
    enough = [pool for pool in candidates if len(pool.nodes) >= spec.min_nodes]
    spaces = [Space(spec, pool, legal(spec, pool.devices), number) for number, pool in enumerate(enough)]
    return Search(spec, spaces, [judge(spec, pool, calibration) for pool in enough], calibration)


def _best_mesh(spec: JobSpec, capacity: Sequence[NodeCapacity], calibration: Calibration | None) -> Mesh | None:
    """The mesh of the fastest plan on `capacity`; None when there is no plan."""
    found = _search(spec, pools(spec, usable(spec, capacity)), calibration).ranked(Wish())
    return candidates(found.rows).mesh(int(found.order()[0])) if len(found) else None


def _planned(
    search: Search, nodes: Sequence[NodeCapacity], ranking: Ranking, choice: Choice, assignment: Assignment | None
) -> Planned:
    spec, found = search.spec, [space.pool for space in search.spaces]
    firsts = ranking.firsts()
    order = firsts[ranking.step[firsts].argsort(kind="stable")][: LISTED + 1]
    rows = {name: np.append(choice.row[name], ranking.rows[name][order]) for name in KEPT}
    taken, *listed = estimates(spec, found, search.judges, rows)
    others = [one for one in listed if one.mesh != taken.mesh][:LISTED]
    sizes = search.spaces[int(choice.row["pool"][0])].sizes
    assigned = assign(taken.pool, taken.mesh, spec.min_nodes, assignment, taken.way == SLOW_FIRST)
    taken = _where_assigned(spec, choice, taken, assigned)
    reason = why(spec, choice, taken, others, sizes, sum(node.devices for node in nodes))
    chosen = taken.candidate(reason)
    return Planned(
        plan=chosen.plan,
        assignment=assigned,
        chosen=chosen,
        alternatives=tuple(_alternative(one, taken) for one in others),
        rejected=sizes.rejected,
        weighed=ranking.weighed,
    )


def _where_assigned(spec: JobSpec, choice: Choice, taken: Estimate, assigned: Assignment) -> Estimate:
    """With the shares of the replicas as their ranks lie on nodes of several speeds."""
    if not taken.pool.mixed or taken.way != SHARES:
        return taken
    speeds = shares.replica_speeds(taken.mesh, assigned, taken.pool)
    multiple = taken.mesh.pp if taken.interleave > 1 else 1
    batch = shares.split(spec.global_batch, speeds, int(choice.row["micro_batch"][0]), multiple)
    return replace(taken, batch=batch)


def _alternative(one: Estimate, taken: Estimate) -> Candidate:
    return one.candidate(compared(one, taken), lost(one, taken))
