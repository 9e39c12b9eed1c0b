"""What breaks, when, and for how long: drawn once per seed, before any policy sees it."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from orchestrator.core.errors import InvalidInput

DAY_S = 86400.0
HOUR_S = 3600.0


class Kind(enum.StrEnum):
    """What happens to its nodes."""

    NODE = "node"  # gone without a word, back after repair
    PROCESS = "process"  # workers end, all nodes stay
    RACK = "rack"  # all nodes of a rack at once
    PREEMPTION = "preemption"  # announced, then gone
    MAINTENANCE = "maintenance"  # planned: announced, then gone


@dataclass(frozen=True, slots=True)
class Outage:
    """`nodes` (indices) are away from `start_s` to `end_s`; of a process failure they are where it happened."""

    start_s: float
    end_s: float
    nodes: tuple[int, ...]
    kind: Kind
    notice_s: float = 0.0
    """Warning before `start_s`."""
    silent: bool = False
    """Nothing reports it: the job hangs until somebody notices."""


@dataclass(frozen=True, slots=True)
class FailureModel:
    """Rates of independent Poisson processes; 0 = does not happen."""

    source: str = ""
    per_1000_node_days: float = 0.0
    """Failures that take a node away."""
    job_per_day: float = 0.0
    """Failures of the job that do not grow with its size and take no node away (software, dependencies)."""
    lemons: float = 0.0
    """Share of nodes that fail `lemon_factor` times as often; the mean rate stays what `per_1000_node_days` says."""
    lemon_factor: float = 1.0
    racks_per_1000_days: float = 0.0
    """Failures of a rack (switch, power) per 1000 rack-days."""
    rack_nodes: int = 16
    """Nodes of a rack, where they do not say in which they are."""
    preemptions_per_node_day: float = 0.0
    notice_s: float = 120.0
    maintenance_per_day: float = 0.0
    """Planned interruptions of one node each, announced `notice_s` before."""
    repair_s: float = 4 * HOUR_S
    """Mean time until a node is back: exponential, but never less than `repair_least_s`."""
    repair_least_s: float = 600.0
    silent: float = 0.13
    """Share of failures that hang the job: 5,948 implicit beside 38,236 explicit ones (arXiv:2509.16293)."""


PRESETS = {
    "llama3": FailureModel(
        "arXiv:2407.21783, section 3.3.4: 419 unexpected interruptions of 2,048 nodes in 54 days, of which 56 software "
        "(bugs, dependencies), and 47 planned ones",
        per_1000_node_days=(419 - 56) / (54 * 2.048),
        job_per_day=56 / 54,
        maintenance_per_day=47 / 54,
        notice_s=600.0,
    ),
    "rsc1": FailureModel(
        "arXiv:2410.21680: 6.5 failures per 1000 node-days on 16,000 A100, few nodes fail repeatedly",
        per_1000_node_days=6.5,
        lemons=0.012,
        lemon_factor=10.0,
    ),
    "rsc2": FailureModel("arXiv:2410.21680: 2.34 failures per 1000 node-days on 8,000 A100", per_1000_node_days=2.34),
    "opt175b": FailureModel(
        "metaseq chronicles: about 2 of 124 nodes a day, and about 90 restarts in 56 days",
        per_1000_node_days=16.0,
        job_per_day=0.5,
    ),
    "spot": FailureModel(
        "spot instances with two minutes of notice, each taken away more than once a day, as in the traces of Bamboo",
        preemptions_per_node_day=1.5,
        repair_s=2 * HOUR_S,
        repair_least_s=120.0,
        silent=0.0,
    ),
    "racks": FailureModel(
        "as llama3, and one rack of 16 nodes lost every 500 rack-days",
        per_1000_node_days=(419 - 56) / (54 * 2.048),
        job_per_day=56 / 54,
        racks_per_1000_days=2.0,
    ),
    "none": FailureModel("nothing ever fails"),
}
"""Failure models by name, each with its source."""


def preset(name: str) -> FailureModel:
    """The model of that name; raises `InvalidInput`."""
    if name not in PRESETS:
        raise InvalidInput(f"there is no failure model {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def draw(
    model: FailureModel, nodes: int, seconds: float, seed: int, racks: Sequence[tuple[int, ...]] = ()
) -> tuple[Outage, ...]:
    """All outages of `nodes` nodes in `seconds`, by time. A node that is away does not fail again before it is back.

    `racks` are the nodes of each; when they are not told, `rack_nodes` in a row are in one.
    """
    in_a_row = range(0, nodes, model.rack_nodes)
    racks = racks or [tuple(range(first, min(nodes, first + model.rack_nodes))) for first in in_a_row]
    found = [
        *_node_failures(model, nodes, seconds, Random(f"{seed} nodes")),
        *_job_failures(model, nodes, seconds, Random(f"{seed} job")),
        *_rack_failures(model, racks, seconds, Random(f"{seed} racks")),
        *_announced(model, nodes, seconds, Random(f"{seed} announced")),
    ]
    ordered = sorted(found, key=lambda one: (one.start_s, one.kind, one.nodes))
    away: dict[int, float] = {}
    kept = []
    for one in ordered:
        if any(away.get(node, 0.0) > one.start_s - one.notice_s for node in one.nodes):
            continue
        kept.append(one)
        if one.kind is not Kind.PROCESS:
            away |= dict.fromkeys(one.nodes, one.end_s)
    return tuple(kept)


def _times(per_s: float, seconds: float, random: Random) -> Iterator[float]:
    """The events of a Poisson process."""
    at = 0.0
    while per_s > 0:
        at += random.expovariate(per_s)
        if at >= seconds:
            return
        yield at


def _repair_s(model: FailureModel, random: Random) -> float:
    """Exponential above the least, with the mean that the model says."""
    return model.repair_least_s + random.expovariate(1 / max(1.0, model.repair_s - model.repair_least_s))


def _node_failures(model: FailureModel, nodes: int, seconds: float, random: Random) -> Iterator[Outage]:
    bad = math.ceil(model.lemons * nodes) if model.lemons else 0
    lemons = random.sample(range(nodes), bad)
    weight = nodes - bad + bad * model.lemon_factor
    for at in _times(model.per_1000_node_days / 1000 / DAY_S * nodes, seconds, random):
        picked = random.random() * weight
        sour = picked >= nodes - bad
        node = lemons[int((picked - (nodes - bad)) / model.lemon_factor)] if sour else random.randrange(nodes)
        yield Outage(at, at + _repair_s(model, random), (node,), Kind.NODE, silent=random.random() < model.silent)


def _job_failures(model: FailureModel, nodes: int, seconds: float, random: Random) -> Iterator[Outage]:
    for at in _times(model.job_per_day / DAY_S, seconds, random):
        yield Outage(at, at, (random.randrange(nodes),), Kind.PROCESS, silent=random.random() < model.silent)


def _rack_failures(
    model: FailureModel, racks: Sequence[tuple[int, ...]], seconds: float, random: Random
) -> Iterator[Outage]:
    for at in _times(model.racks_per_1000_days / 1000 / DAY_S * len(racks), seconds, random):
        members = racks[random.randrange(len(racks))]
        yield Outage(at, at + _repair_s(model, random), members, Kind.RACK)


def _announced(model: FailureModel, nodes: int, seconds: float, random: Random) -> Iterator[Outage]:
    for kind, per_s in (
        (Kind.PREEMPTION, model.preemptions_per_node_day / DAY_S * nodes),
        (Kind.MAINTENANCE, model.maintenance_per_day / DAY_S),
    ):
        for at in _times(per_s, seconds, random):
            yield Outage(at, at + _repair_s(model, random), (random.randrange(nodes),), kind, model.notice_s)
