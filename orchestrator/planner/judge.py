"""Memory and time of the plans of one job on one pool, by the models where the job is described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, Protocol

import numpy as np

from orchestrator.core.spec import JobSpec, ModelSpec
from orchestrator.planner import shares
from orchestrator.planner.calibration import Calibration
from orchestrator.planner.candidates import Candidates, Floats, Ints
from orchestrator.planner.cost import AS_FAST, Speeds, time_terms
from orchestrator.planner.hardware import Machine
from orchestrator.planner.memory import USABLE, memory_terms
from orchestrator.planner.numbers import Numbers
from orchestrator.planner.pool import Pool
from orchestrator.planner.transformer import model_flops

SHARES, SLOW_LAST, SLOW_FIRST = range(3)
"""What devices of several speeds get: unequal shares of the batch, or equal ones and stages of their own for the slow,
which come last or first."""
_ROUND = 1e-9


class Judge(Protocol):
    """What the search needs to know of plans; all of one length in, an array of that length out."""

    @property
    def limit_bytes(self) -> float:
        """What a plan may fill of a device; infinite where it is not known."""

    def memory(self, plans: Candidates) -> Floats:
        """Bytes on the fullest device."""

    def seconds(self, plans: Candidates) -> Floats:
        """Per step; relative units where the model is not described."""

    def at_least(self, plans: Candidates, replicas: tuple[Ints, Ints], known: bool = True) -> Floats:
        """Of these, what no number of replicas between two gets below, however divided over dp_replicate and dp_shard.

        Unless the layers per stage are `known`, no split that has as many in its fullest stage does, either.
        """

    def least_memory(self, plans: Candidates) -> Floats:
        """Bytes that no division over dp_replicate and fewer dp_shard gets below."""

    def where_seconds(self, plans: Candidates) -> Mapping[str, Floats]:
        """Seconds by what they are spent on."""

    def where_memory(self, plans: Candidates) -> Mapping[str, Floats]:
        """Bytes by what they hold."""

    def way(self, plans: Candidates) -> Ints:
        """Where devices are not all as fast: `SHARES`, `SLOW_LAST` or `SLOW_FIRST`, whichever is fastest."""

    def utilisation(self, tokens_per_s: float, devices: int) -> float:
        """Model FLOPs utilisation (MFU) of so many devices at this speed."""


def judge(spec: JobSpec, pool: Pool, calibration: Calibration | None = None) -> Judge:
    """The judge of plans of `spec` on `pool`."""
    if spec.model is None:
        return Undescribed()
    limit = pool.memory_bytes * USABLE if pool.memory_bytes else inf
    alike = Described(spec.model, pool.machine, limit, calibration)
    return Mixed(alike, pool, spec.global_batch) if pool.mixed else alike


@dataclass(frozen=True, slots=True)
class Described:
    """By the closed forms of `memory` and `cost`; seconds and bytes."""

    model: ModelSpec
    machine: Machine
    limit_bytes: float
    calibration: Calibration | None = None

    @property
    def numbers(self) -> Numbers:
        """Those of our trainer on this device."""
        return Numbers("fp32" if self.machine.device.number_bytes == 4 else "bf16")

    def memory(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return memory_terms(self.model, self.machine, plans, self.numbers).total

    def seconds(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return time_terms(self.model, self.machine, plans, self.numbers, self.calibration).total

    def at_least(self, plans: Candidates, replicas: tuple[Ints, Ints], known: bool = True) -> Floats:
        """See `Judge`. Stages of the fewest replicas are the smallest, and send least far."""
        few = replace(plans, dp_shard=plans.dp_shard * replicas[0])
        terms = time_terms(self.model, self.machine, few, self.numbers, self.calibration)
        return np.asarray(terms.total - terms.data - terms.optimizer)

    def least_memory(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return self.memory(plans)

    def where_seconds(self, plans: Candidates, speeds: Speeds = AS_FAST) -> Mapping[str, Floats]:
        """See `Judge`; `speeds` where pipeline stages are not all as fast."""
        return _by_name(time_terms(self.model, self.machine, plans, self.numbers, self.calibration, speeds))

    def where_memory(self, plans: Candidates) -> Mapping[str, Floats]:
        """See `Judge`."""
        return _by_name(memory_terms(self.model, self.machine, plans, self.numbers))

    def way(self, plans: Candidates) -> Ints:
        """See `Judge`."""
        return np.full(len(plans), SHARES)

    def utilisation(self, tokens_per_s: float, devices: int) -> float:
        """See `Judge`."""
        return tokens_per_s * model_flops(self.model) / (devices * self.machine.device.peak_flops_per_s)


@dataclass(frozen=True, slots=True)
class Mixed:
    """On nodes of several speeds: with unequal shares of the batch, or equal ones and each pipeline stage at its own
    speed, whichever is faster (see `shares`).
    """

    alike: Described
    """As if all were as fast as the slowest."""
    pool: Pool
    batch: int

    @property
    def limit_bytes(self) -> float:
        """See `Judge`."""
        return self.alike.limit_bytes

    def memory(self, plans: Candidates) -> Floats:
        """See `Judge`. With as many micro-batches as either way takes."""
        return self.alike.memory(self._fullest(plans))

    def seconds(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return np.asarray(np.stack([_total(way) for way in self._ways(plans)]).min(axis=0))

    def at_least(self, plans: Candidates, replicas: tuple[Ints, Ints], known: bool = True) -> Floats:
        """See `Judge`. Stages: the speeds of the fewest replicas.

        Shares: no replica is ever idle, or is done before the fastest one with all rows or the slowest with one.
        """
        least, most = replicas
        few = replace(plans, dp_shard=plans.dp_shard * least)
        ways = [shares.stages_of(self.pool, few, slow_first) for slow_first in (False, True)]
        speed = np.minimum(self.pool.speeds[-1], ways[0].last * plans.micro_batch)
        together = shares.most_speed(self.pool, plans, least, most)
        filled = self.batch * speed / (together * plans.micro_batches * plans.micro_batch)
        terms = dict(self.alike.where_seconds(plans, Speeds(speed, speed, speed)))
        terms |= {name: terms[name] * np.maximum(filled, 1) for name in ("compute", "recompute")}
        shared = _total(terms) - terms["data"] - terms["optimizer"]
        if not known:
            fastest = ways[0].first
            ways = [Speeds(fastest, fastest, fastest)]
        staged = [self.alike.where_seconds(plans, speeds) for speeds in ways]
        free = [_total(one) - one["data"] - one["optimizer"] for one in staged]
        return np.asarray(np.minimum(shared, np.stack(free).min(axis=0)))

    def least_memory(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return self.alike.memory(plans)

    def where_seconds(self, plans: Candidates) -> Mapping[str, Floats]:
        """See `Judge`."""
        ways = self._ways(plans)
        best = _fastest(ways)
        return {name: np.choose(best, [one[name] for one in ways]) for name in ways[0]}

    def where_memory(self, plans: Candidates) -> Mapping[str, Floats]:
        """See `Judge`."""
        return self.alike.where_memory(self._fullest(plans))

    def way(self, plans: Candidates) -> Ints:
        """See `Judge`."""
        return _fastest(self._ways(plans))

    def utilisation(self, tokens_per_s: float, devices: int) -> float:
        """See `Judge`; of the fastest devices, those which a plan takes."""
        return tokens_per_s * model_flops(self.alike.model) / self.pool.peak_flops_per_s(devices)

    def _ways(self, plans: Candidates) -> list[Mapping[str, Floats]]:
        """Seconds by `Judge.way`."""
        found = shares.of_plans(self.pool, self.batch, plans)
        speeds = Speeds(found.speed, found.speed, found.speed)
        shared = self.alike.where_seconds(replace(plans, micro_batches=found.micro_batches), speeds)
        orders = (False, True) if (plans.pp > 1).any() else (False,)
        staged = [shares.stages_of(self.pool, plans, slow_first) for slow_first in orders]
        return [shared, *(self.alike.where_seconds(plans, speeds) for speeds in staged)]

    def _fullest(self, plans: Candidates) -> Candidates:
        """With as many micro-batches as the shares take, or the plan has."""
        number = shares.of_plans(self.pool, self.batch, plans).micro_batches
        return replace(plans, micro_batches=np.maximum(number, plans.micro_batches))


@dataclass(frozen=True, slots=True)
class Undescribed:
    """In units of one sample on one device: work and bubble alone; memory is not known."""

    limit_bytes: float = inf

    def memory(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return np.zeros(len(plans))

    def seconds(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        work = plans.micro_batch * plans.micro_batches / (plans.pp * plans.cp * plans.tp)
        return np.asarray(work * (1 + (plans.pp - 1) / plans.interleave / plans.micro_batches))

    def at_least(self, plans: Candidates, replicas: tuple[Ints, Ints], known: bool = True) -> Floats:
        """See `Judge`."""
        return self.seconds(plans)

    def least_memory(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return self.memory(plans)

    def where_seconds(self, plans: Candidates) -> Mapping[str, Floats]:
        """See `Judge`."""
        return {}

    def where_memory(self, plans: Candidates) -> Mapping[str, Floats]:
        """See `Judge`."""
        return {}

    def way(self, plans: Candidates) -> Ints:
        """See `Judge`."""
        return np.full(len(plans), SHARES)

    def utilisation(self, tokens_per_s: float, devices: int) -> float:
        """See `Judge`."""
        return 0.0


def _fastest(ways: Sequence[Mapping[str, Floats]]) -> Ints:
    """Which way each plan takes: shares where nothing is faster."""
    took = np.stack([_total(one) for one in ways])
    took[SHARES] *= 1 - _ROUND
    return np.asarray(took.argmin(axis=0))


def _total(terms: Mapping[str, Floats]) -> Floats:
    return np.asarray(sum(terms.values()))


def _by_name(terms: Any) -> dict[str, Floats]:
    return {one.name: getattr(terms, one.name) for one in fields(terms)}
