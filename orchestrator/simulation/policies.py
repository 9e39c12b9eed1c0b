"""What is compared: the same core and planner, told to behave as people do today, or left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from orchestrator.core.errors import InvalidInput
from orchestrator.core.spec import AutoInterval, AxisBounds, JobSpec
from orchestrator.core.types import AssignedNode, Assignment, Mesh, NodeCapacity, Plan
from orchestrator.planner import Infeasible, Planned, Ready, plan

FOREVER_S = 1e12
FIXED_S = 1800.0
"""Between saves, where a policy has a fixed interval."""
SPARES = 0.02
"""Share of the nodes that is held back as hot spares."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to answer failures."""

    name: str
    about: str
    shrink: bool = True
    """Train on what is left."""
    spares: float = 0.0
    """Share of the nodes held back."""
    equal: bool = False
    """Only as many nodes as divide the batch equally, under the mesh it began with."""
    fixed_interval: bool = False

    def held_back(self, nodes: int) -> int:
        """Nodes that are spares."""
        return round(self.spares * nodes) if self.spares * nodes >= 1 or not self.spares else 1

    def spec(self, job: JobSpec, nodes: Sequence[NodeCapacity]) -> JobSpec:
        """The job as this policy runs it; one that never shrinks, on as many nodes as its best plan takes."""
        used = len(nodes) - self.held_back(len(nodes))
        least = job.min_nodes
        if not self.shrink:
            best = plan(replace(job, min_nodes=min(least, used), max_nodes=used), nodes[:used])
            least = used = len(best.assignment.names) if isinstance(best, Planned) else used
        patience_s = None if self.shrink else FOREVER_S
        checkpoint = replace(job.checkpoint, every_s=None, every_steps=None, auto=job.checkpoint.auto or AutoInterval())
        if self.fixed_interval:
            checkpoint = replace(checkpoint, every_s=FIXED_S, auto=None)
        recovery = replace(job.recovery, wait_for_replacement_s=patience_s, start_within_s=FOREVER_S)
        return replace(job, min_nodes=min(least, used), max_nodes=used, checkpoint=checkpoint, recovery=recovery)


POLICIES = {
    one.name: one
    for one in (
        Policy("regrow", "shrink, wait, use what is there or grow, whatever is worth most; interval by Daly"),
        Policy(
            "baseline",
            "hot spares, automatic restart on as many nodes, saves every half hour",
            shrink=False,
            spares=SPARES,
            fixed_interval=True,
        ),
        Policy("wait", "wait for every lost node; interval by Daly", shrink=False),
        Policy("spares", "a fiftieth of the nodes held back; wait when they are used up", shrink=False, spares=SPARES),
        Policy("equal", "shrink to numbers of nodes that divide the batch equally", equal=True),
        Policy("interval", "as regrow, with a fixed interval between saves", fixed_interval=True),
    )
}
"""Policies by name; `regrow` first."""


def named(name: str) -> Policy:
    """The policy of that name; raises `InvalidInput`."""
    if name not in POLICIES:
        raise InvalidInput(f"there is no policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


@dataclass(slots=True)
class Planner:
    """The real planner under a policy, for nodes that are all alike: what it has answered once it knows."""

    spec: JobSpec
    policy: Policy
    first: Plan | None = None
    """The plan on all nodes, whose mesh an `equal` policy keeps."""
    _ready: Ready = field(default_factory=Ready)
    _known: dict[tuple[int, Mesh | None], Planned | Infeasible] = field(default_factory=dict)

    def plan(
        self, nodes: Sequence[NodeCapacity], previous: Plan | None, assignment: Assignment | None
    ) -> Planned | Infeasible:
        """As `orchestrator.planner.plan`."""
        if self.spec.rack_oversubscription > 1:  # it matters which nodes are left
            return self._plan(nodes, previous, assignment)
        key = len(nodes), previous.mesh if previous else None
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._plan(nodes, previous, assignment)
        return found if isinstance(found, Infeasible) else _on(found, nodes, assignment)

    def _plan(
        self, nodes: Sequence[NodeCapacity], previous: Plan | None, assignment: Assignment | None
    ) -> Planned | Infeasible:
        if not self.policy.equal or self.first is None:
            return plan(self.spec, nodes, previous, assignment, ready=self._ready)
        mesh, batch = self.first.mesh, self.spec.global_batch
        sizes = {axis: getattr(mesh, axis) for axis in ("pp", "cp", "tp", "ep")}
        per_replica = mesh.pp * mesh.cp * mesh.tp
        most = min(sum(node.devices for node in nodes) // per_replica, mesh.dp_degree)
        replicas = next((one for one in range(most, 0, -1) if batch % one == 0), 1)
        bounds = {axis: AxisBounds(size, size) for axis, size in sizes.items()}
        bounds |= {"dp_replicate": AxisBounds(1, 1), "dp_shard": AxisBounds(replicas, replicas)}
        return plan(replace(self.spec, parallelism=bounds), nodes, None, assignment)


def _on(planned: Planned, nodes: Sequence[NodeCapacity], before: Assignment | None) -> Planned:
    """The same plan on other nodes of the same kind: those used before keep their order, as the planner has it."""
    here = {node.node for node in nodes}
    kept = [name for name in before.names if name in here] if before else []
    known = set(kept)
    order = [*kept, *(node.node for node in nodes if node.node not in known)]
    parts = zip(planned.assignment, order, strict=False)
    return replace(
        planned, assignment=Assignment(tuple(AssignedNode(name, one.first_rank, one.devices) for one, name in parts))
    )
