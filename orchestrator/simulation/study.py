"""Policies over seeds: the same cluster and the same failures for each, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from statistics import mean, pstdev
from typing import Any

from orchestrator.core.errors import InvalidInput
from orchestrator.core.spec import JobSpec
from orchestrator.core.types import NodeCapacity
from orchestrator.planner import Infeasible, plan
from orchestrator.simulation.account import CAUSES, Account
from orchestrator.simulation.failures import DAY_S, FailureModel, Outage, draw
from orchestrator.simulation.policies import Policy
from orchestrator.simulation.timing import Timing
from orchestrator.simulation.traces import outages
from orchestrator.simulation.world import World


@dataclass(frozen=True, slots=True)
class Study:
    """What is simulated."""

    job: JobSpec
    nodes: tuple[NodeCapacity, ...]
    """All alike but for their racks."""
    policies: tuple[Policy, ...]
    days: float
    seeds: tuple[int, ...] = (1,)
    failures: FailureModel | None = None
    trace: tuple[tuple[float, int], ...] = ()
    """(seconds, nodes) instead of `failures`."""
    timing: Timing = field(default_factory=Timing)

    @property
    def seconds(self) -> float:
        """Time simulated."""
        return self.days * DAY_S

    @property
    def devices(self) -> int:
        """Of all nodes."""
        return sum(node.devices for node in self.nodes)

    def outages(self, seed: int) -> tuple[Outage, ...]:
        """What happens under this seed, whatever the policy."""
        if self.failures is None:
            return outages(list(self.trace), len(self.nodes), self.seconds, seed)
        racks: dict[str, list[int]] = {}
        for number, node in enumerate(self.placed):
            racks.setdefault(node.rack, []).append(number)
        return draw(self.failures, len(self.nodes), self.seconds, seed, [tuple(rack) for rack in racks.values()])

    @property
    def placed(self) -> tuple[NodeCapacity, ...]:
        """The nodes in racks: those that do not say are in one with their neighbours, as the failure model has it."""
        if self.failures is None:
            return self.nodes
        size = self.failures.rack_nodes
        return tuple(
            node if node.rack else replace(node, rack=f"rack-{number // size}")
            for number, node in enumerate(self.nodes)
        )

    def check(self) -> None:
        """Raises `InvalidInput` for what cannot be simulated."""
        if not self.days > 0 or not self.seeds or not self.policies:
            raise InvalidInput("a study needs more than 0 days, at least one seed and one policy")
        if len({(node.devices, node.kind, node.memory_bytes, node.speed) for node in self.nodes}) != 1:
            raise InvalidInput("simulated nodes are all alike: give one group, for example 32x8:h100")
        if self.job.model is None:
            raise InvalidInput("speeds are estimated from the model: give spec.model in the job file")
        for policy in self.policies:
            spec = policy.spec(self.job, self.placed)
            found = plan(spec, self.placed[: spec.max_nodes])
            if isinstance(found, Infeasible):
                raise InvalidInput(f"the job has no plan on these nodes: {found.reason}")


@dataclass(frozen=True, slots=True)
class Result:
    """One policy under one seed."""

    policy: str
    seed: int
    shares: dict[str, float]
    goodput: float
    ettr: float
    interruptions: int
    changes: int
    generations: int
    phase: str


def simulate(study: Study, policy: Policy, seed: int) -> Result:
    """Live through it once."""
    world = World(study.job, study.placed, study.outages(seed), policy, study.timing, study.seconds)
    account: Account = world.run()
    return Result(
        policy.name, seed, account.shares(), account.goodput, account.ettr, account.interruptions, account.changes,
        world.job.history.number, world.job.phase.value,
    )  # fmt: skip


def run(study: Study, workers: int = 1, done: Callable[[Result], None] = lambda one: None) -> list[Result]:
    """All policies under all seeds, in that order however many processes share the work."""
    study.check()
    pairs = [(policy, seed) for policy in study.policies for seed in study.seeds]
    found = []
    for one in _results(study, pairs, workers):
        done(one)
        found.append(one)
    return found


def _results(study: Study, pairs: Sequence[tuple[Policy, int]], workers: int) -> Iterator[Result]:
    if workers <= 1 or len(pairs) == 1:
        yield from (simulate(study, policy, seed) for policy, seed in pairs)
        return
    with ProcessPoolExecutor(min(workers, len(pairs))) as pool:
        yield from pool.map(simulate, [study] * len(pairs), *zip(*pairs, strict=True))


@dataclass(frozen=True, slots=True)
class Summary:
    """One policy over all seeds."""

    policy: Policy
    goodput: float
    spread: float
    """Standard deviation of the goodput over the seeds."""
    least: float
    most: float
    ettr: float
    shares: dict[str, float]
    """Means by cause; they sum to 1."""
    device_hours: float
    """Of all nodes given."""
    useful_device_hours: float
    interruptions: float
    changes: float


def summarize(study: Study, results: Sequence[Result]) -> list[Summary]:
    """Means over seeds, best first."""
    hours = study.devices * study.seconds / 3600
    found = []
    for policy in study.policies:
        mine = [one for one in results if one.policy == policy.name]
        goodputs = [one.goodput for one in mine]
        found.append(
            Summary(
                policy,
                mean(goodputs),
                pstdev(goodputs),
                min(goodputs),
                max(goodputs),
                mean(one.ettr for one in mine),
                {cause: mean(one.shares[cause] for one in mine) for cause in CAUSES},
                hours,
                hours * mean(goodputs),
                mean(one.interruptions for one in mine),
                mean(one.changes for one in mine),
            )
        )
    return sorted(found, key=lambda one: -one.goodput)


def to_data(study: Study, results: Sequence[Result]) -> dict[str, Any]:
    """For JSON: the summaries and every single result."""
    summaries = [
        {
            "policy": one.policy.name,
            "goodput": one.goodput,
            "goodput_spread": one.spread,
            "goodput_least": one.least,
            "goodput_most": one.most,
            "ettr": one.ettr,
            "shares": one.shares,
            "device_hours": one.device_hours,
            "useful_device_hours": one.useful_device_hours,
            "interruptions": one.interruptions,
            "planned_changes": one.changes,
        }
        for one in summarize(study, results)
    ]
    runs = [
        {"policy": one.policy, "seed": one.seed, "goodput": one.goodput, "ettr": one.ettr, "shares": one.shares,
         "interruptions": one.interruptions, "planned_changes": one.changes, "generations": one.generations,
         "phase": one.phase}
        for one in results
    ]  # fmt: skip
    return {
        "nodes": len(study.nodes),
        "devices": study.devices,
        "days": study.days,
        "policies": summaries,
        "runs": runs,
    }
