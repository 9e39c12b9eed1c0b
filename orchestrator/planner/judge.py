"""Memory and time of the plans of one job on one pool, by the models where the job is described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from typing import Any, Protocol

import numpy as np

from orchestrator.core.spec import JobSpec, ModelSpec
from orchestrator.planner.candidates import Candidates, Floats
from orchestrator.planner.interim import USABLE, Machine, memory_terms, time_terms
from orchestrator.planner.pool import Pool
from orchestrator.planner.transformer import layer_flops, output_flops


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


def judge(spec: JobSpec, pool: Pool, calibration: Any = None) -> Judge:
    """The judge of plans of `spec` on `pool`."""
    if spec.model is None:
        return Undescribed()
    limit = pool.memory_bytes * USABLE if pool.memory_bytes else inf
    return Described(spec.model, pool.machine, limit, calibration)


@dataclass(frozen=True, slots=True)
class Described:
    """By the closed forms of `memory` and `cost`; seconds and bytes."""

    model: ModelSpec
    machine: Machine
    limit_bytes: float
    calibration: Any = None

    def memory(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return memory_terms(self.model, self.machine, plans).total

    def seconds(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return time_terms(self.model, self.machine, plans).total

    def at_least(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        terms = time_terms(self.model, self.machine, plans)
        return terms.compute + terms.recompute + terms.tensor + terms.context + terms.pipeline + terms.bubble

    def least_memory(self, plans: Candidates) -> Floats:
        """See `Judge`."""
        return self.memory(plans)

    def where_seconds(self, plans: Candidates) -> Mapping[str, Floats]:
        """See `Judge`."""
        return _by_name(time_terms(self.model, self.machine, plans))

    def where_memory(self, plans: Candidates) -> Mapping[str, Floats]:
        """See `Judge`."""
        return _by_name(memory_terms(self.model, self.machine, plans))

    def utilisation(self, tokens_per_device_s: float) -> float:
        """See `Judge`."""
        flops = 3 * (self.model.layers * layer_flops(self.model) + output_flops(self.model))
        return tokens_per_device_s * flops / self.machine.device.flops_per_s


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
