"""The planner's one entry: enumerate, estimate, choose, assign, explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import Assignment, BatchSplit, Mesh, NodeCapacity, Plan
from orchestrator.planner import shortage
from orchestrator.planner.assign import assign
from orchestrator.planner.batch import split
from orchestrator.planner.choose import choose, honoured
from orchestrator.planner.estimate import Estimate, TooBig, estimate, shortest
from orchestrator.planner.explain import compared, why
from orchestrator.planner.legality import legal
from orchestrator.planner.meshes import meshes
from orchestrator.planner.outcome import Candidate, Infeasible, Planned
from orchestrator.planner.pool import Pool, pools, usable
from orchestrator.planner.transformer import split_layers

_ALTERNATIVES = 10
_PRUNE_FROM = 200
_HOPELESS = 1.5
"""On large clusters a mesh whose computing alone takes this much longer than a whole known plan is not estimated."""


def plan(
    spec: JobSpec,
    capacity: Sequence[NodeCapacity],
    previous: Plan | None = None,
    assignment: Assignment | None = None,
) -> Planned | Infeasible:
    """The best legal plan of `spec` on the nodes of `capacity`, or why there is none.

    `previous` is the plan that ran last: its mesh is kept while nothing is clearly better. `assignment` is where it
    ran: its nodes are preferred and keep their order. The order of `capacity` does not matter.
    """
    nodes = usable(spec, capacity)
    hopeless = shortage.before_search(spec, nodes)
    if hopeless is not None:
        return hopeless
    candidates = pools(spec, nodes)
    found = _explore(spec, candidates, previous.mesh if previous else None)
    if found.estimates:
        return _planned(spec, nodes, found, previous, assignment)
    if found.too_big:
        return shortage.too_big(spec, found.too_big, _enough(spec, candidates))
    return shortage.no_mesh(spec, candidates)


@dataclass(slots=True)
class _Found:
    estimates: list[Estimate] = field(default_factory=list)
    too_big: list[TooBig] = field(default_factory=list)


def _explore(spec: JobSpec, candidates: Sequence[Pool], previous: Mesh | None) -> _Found:
    found = _Found()
    fastest = float("inf")
    for pool in candidates:
        if len(pool.nodes) < spec.min_nodes:
            continue
        options = meshes(spec, pool, legal(spec, pool.devices), previous)
        bounded = sorted((shortest(spec, pool, mesh), -mesh.world_size, mesh.sizes, mesh) for mesh in options)
        for at_least, *_, mesh in bounded:
            if len(options) > _PRUNE_FROM and at_least > _HOPELESS * fastest and not honoured(spec, mesh):
                continue
            result = estimate(spec, pool, mesh)
            if isinstance(result, TooBig):
                found.too_big.append(result)
                continue
            found.estimates.append(result)
            fastest = min(fastest, result.step)
    return found


def _planned(
    spec: JobSpec, nodes: Sequence[NodeCapacity], found: _Found, previous: Plan | None, assignment: Assignment | None
) -> Planned:
    choice = choose(spec, found.estimates, previous.mesh if previous else None)
    taken = choice.estimate
    others = _others(found.estimates, taken)
    sizes = legal(spec, taken.pool.devices)
    reason = why(spec, choice, others, _split(spec, taken), sizes, sum(node.devices for node in nodes))
    chosen = _candidate(spec, taken, reason)
    alternatives = tuple(
        _candidate(spec, item, compared(item, _split(spec, item), taken)) for item in others[:_ALTERNATIVES]
    )
    return Planned(
        plan=chosen.plan,
        assignment=assign(taken.pool, taken.mesh, spec.min_nodes, assignment),
        chosen=chosen,
        alternatives=alternatives,
        rejected=sizes.rejected + shortage.memory_rejections(found.too_big),
    )


def _others(estimates: Sequence[Estimate], taken: Estimate) -> list[Estimate]:
    """The best estimate of every other mesh, fastest first."""
    best: dict[Mesh, Estimate] = {}
    for item in sorted(estimates, key=lambda item: (item.step, -item.mesh.world_size, item.mesh)):
        if item.mesh != taken.mesh:
            best.setdefault(item.mesh, item)
    return list(best.values())


def _split(spec: JobSpec, item: Estimate) -> BatchSplit:
    return split(spec.global_batch, item.mesh.dp_degree, item.micro_batch)


def _candidate(spec: JobSpec, item: Estimate, reason: str) -> Candidate:
    described = spec.model is not None
    plan = Plan(
        mesh=item.mesh,
        batch=_split(spec, item),
        recomputation=item.recomputation,
        stage_layers=split_layers(spec.model.layers, item.mesh.pp) if spec.model else (),
        reason=reason,
        memory_bytes=item.memory_bytes,
        step_s=item.step if described else 0.0,
    )
    return Candidate(plan, item.cost)


def _enough(spec: JobSpec, candidates: Sequence[Pool]) -> int | None:
    """Devices, found by doubling, on which some mesh fits into memory; None when many times more would not do."""
    pool = max(candidates, key=lambda item: (item.memory_bytes, item.devices))
    for factor in (2, 4, 8, 16, 32, 64):
        more = tuple(replace(node, node=f"{node.node}+{copy}") for node in pool.nodes for copy in range(factor))
        larger = Pool(more, spec.max_nodes * factor, pool.device, pool.memory_bytes)
        if _explore(spec, [larger], None).estimates:
            return larger.devices
    return None
