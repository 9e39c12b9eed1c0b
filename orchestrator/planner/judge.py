"""Memory and time of the plans of one job on one pool, by the models where the job is described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, Protocol

import numpy as np

from orchestrator.core.spec import JobSpec, ModelSpec
from orchestrator.planner import shares
from orchestrator.planner.calibration import Calibration
from orchestrator.planner.candidates import Candidates, Floats
from orchestrator.planner.cost import time_terms
from orchestrator.planner.hardware import Machine
from orchestrator.planner.memory import USABLE, memory_terms
from orchestrator.planner.numbers import Numbers
from orchestrator.planner.pool import Pool
from orchestrator.planner.transformer import model_flops

COMPUTING = ("compute", "recompute", "bubble")
"""Terms of time that a faster device makes shorter."""


class Judge(Protocol):
    """What the search needs to know of plans; all of one length in, an array of that length out."""

    @property
    def limit_bytes(self) -> float:
        """What a plan may fill of a device; infinite where it is not known."""

    def memory(self, plans: Candidates) -> Floats:
        """Bytes on the fullest device."""

    def seconds(self, plans: Candidates) -> Floats:
        """Per step; relative units where the model is not described."""

    def at_least(self, plans: Candidates) -> Floats:
        """Of these, what does not depend on how replicas are divided over dp_replicate and dp_shard."""

    def least_memory(self, plans: Candidates) -> Floats:
        """Bytes that no division over dp_replicate and fewer dp_shard gets below."""

    def where_seconds(self, plans: Candidates) -> Mapping[str, Floats]:
        """Seconds by what they are spent on."""

    def where_memory(self, plans: Candidates) -> Mapping[str, Floats]:
        """Bytes by what they hold."""

    def utilisation(self, tokens_per_device_s: float) -> float:
        """Model FLOPs utilisation (MFU) at this speed."""


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

    def at_least(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        terms = time_terms(self.model, self.machine, plans, self.numbers, self.calibration)
        return np.asarray(terms.total - terms.data - terms.optimizer)

    def least_memory(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return self.memory(plans)

    def where_seconds(self, plans: Candidates) -> Mapping[str, Floats]:
        """See `Judge`."""
        return _by_name(time_terms(self.model, self.machine, plans, self.numbers, self.calibration))

    def where_memory(self, plans: Candidates) -> Mapping[str, Floats]:
        """See `Judge`."""
        return _by_name(memory_terms(self.model, self.machine, plans, self.numbers))

    def utilisation(self, tokens_per_device_s: float) -> float:
        """See `Judge`."""
        return tokens_per_device_s * model_flops(self.model) / self.machine.device.peak_flops_per_s


@dataclass(frozen=True, slots=True)
class Mixed:
    """On nodes of several speeds, which get unequal shares of the batch (see `shares`)."""

    alike: Described
    """As if all were as fast as the slowest."""
    pool: Pool
    batch: int

    @property
    def limit_bytes(self) -> float:
        """See `Judge`."""
        return self.alike.limit_bytes

    def memory(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return self.alike.memory(self._shared(plans)[0])

    def seconds(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return np.asarray(sum(self.where_seconds(plans).values()))

    def at_least(self, plans: Candidates) -> Floats:
        """See `Judge`. With the fewest samples that an equal share may be, and all as fast as the fastest."""
        number, most, fastest = plans.micro_batches, plans.micro_batch, self.pool.speeds[-1]
        few = np.maximum(1.0, (most - 1) / fastest - 1) / most  # of one micro-batch, which may hold more than a share
        filled = np.where(number > 1, (number - 1) / number, few)
        terms = self.alike.where_seconds(plans)
        computing = np.asarray(sum(terms[name] for name in COMPUTING))
        return self.alike.at_least(plans) - computing * (1 - filled / fastest)

    def least_memory(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return self.alike.memory(plans)

    def where_seconds(self, plans: Candidates) -> Mapping[str, Floats]:
        """See `Judge`."""
        plans, relative = self._shared(plans)
        terms = self.alike.where_seconds(plans)
        return {name: seconds * relative if name in COMPUTING else seconds for name, seconds in terms.items()}

    def where_memory(self, plans: Candidates) -> Mapping[str, Floats]:
        """See `Judge`."""
        return self.alike.where_memory(self._shared(plans)[0])

    def utilisation(self, tokens_per_device_s: float) -> float:
        """See `Judge`; of the slowest devices' peak."""
        return self.alike.utilisation(tokens_per_device_s)

    def _shared(self, plans: Candidates) -> tuple[Candidates, Floats]:
        """The plans with as many micro-batches as their shares take, and the time of one relative to equal shares."""
        found = shares.of_plans(self.pool, self.batch, plans)
        return replace(plans, micro_batches=found.micro_batches), found.relative


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

    def at_least(self, plans: Candidates) -> Floats:
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

    def utilisation(self, tokens_per_device_s: float) -> float:
        """See `Judge`."""
        return 0.0


def _by_name(terms: Any) -> dict[str, Floats]:
    return {one.name: getattr(terms, one.name) for one in fields(terms)}
