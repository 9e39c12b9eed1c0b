"""Published or own measurements beside what the models of time and memory say: one row, one plan, one prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from math import gcd, inf
from typing import TypeVar

import numpy as np

from orchestrator.core.spec import ModelSpec
from orchestrator.core.types import Recomputation
from orchestrator.planner.calibration import Calibration
from orchestrator.planner.candidates import RECOMPUTATIONS, Candidates
from orchestrator.planner.cost import TimeTerms, time_terms
from orchestrator.planner.hardware import Machine
from orchestrator.planner.memory import MemoryTerms, memory_terms
from orchestrator.planner.numbers import Numbers
from orchestrator.planner.transformer import (
    active_parameters,
    attention_flops,
    output_flops,
    split_layers,
)

NONE, FULL = map(RECOMPUTATIONS.index, (Recomputation.NONE, Recomputation.FULL))
Terms = TypeVar("Terms", TimeTerms, MemoryTerms)
ROUNDING = 1e-9
FILLED = 1.0
"""Share of a device's memory up to which a row counts as fitting: what was measured had no margin."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training run that was measured, or that ran out of memory."""

    row_id: str
    model: ModelSpec
    machine: Machine
    numbers: Numbers
    devices: int
    global_batch: int
    tp: int = 1
    pp: int | None = None
    """None where the table does not say: then the fastest that fits is taken; so with the next two."""
    interleave: int | None = 1
    micro_batch: int | None = None
    cp: int = 1
    ep: int | None = 1
    """None as with `pp`: of the sizes that divide experts and ranks."""
    dp_shard: int | None = None
    """None = all data-parallel ranks."""
    zero: int | None = 1
    """None where the table does not say: 1, or 3 where a whole copy of the parameters does not fit."""
    recomputation: int | None = 0
    """Index into `RECOMPUTATIONS`; None as with `pp`, or of as many layers as it takes to fit."""
    measured_s: float | None = None
    measured_bytes: float | None = None
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the models say of a row."""

    row: Row
    step_s: float
    memory_bytes: float
    fits: bool
    time: TimeTerms
    memory: MemoryTerms

    @property
    def time_error(self) -> float | None:
        """Relative: 0.1 = predicted a tenth too slow; None where nothing was measured."""
        return self.step_s / self.row.measured_s - 1 if self.row.measured_s else None

    @property
    def memory_error(self) -> float | None:
        """Relative, as `time_error`."""
        return self.memory_bytes / self.row.measured_bytes - 1 if self.row.measured_bytes else None


def measured_flops(model: ModelSpec, hardware: bool) -> float:
    """Operations per token as tables of TFLOP/s count them: attention in full although half is masked out (Narayanan et
    al. 2021, arXiv:2104.04473, section 5.1); `hardware` counts the forward pass twice, as full recomputation does.
    """
    layers = model.layers * (2 * active_parameters(model) + 2 * attention_flops(model))
    return (4 if hardware else 3) * layers + 3 * output_flops(model)


def predict(row: Row, calibration: Calibration | None = None) -> Prediction:
    """Time and memory of the row's plan."""
    plans = _plans(row)
    time = time_terms(row.model, row.machine, plans, row.numbers, calibration)
    memory = memory_terms(row.model, row.machine, plans, row.numbers)
    limit = row.machine.device.memory_bytes * FILLED or inf
    if row.recomputation is None:
        time, memory = _partly(time, memory, plans, limit)
    fits = memory.total <= limit * (1 + ROUNDING)
    best = int(np.argmin(np.where(fits, time.total, time.total + time.total.max()))) if len(plans) > 1 else 0
    return Prediction(
        row, float(time.total[best]), float(memory.total[best]), bool(fits[best]), time.take(best), memory.take(best)
    )


def _partly(time: TimeTerms, memory: MemoryTerms, plans: Candidates, limit: float) -> tuple[TimeTerms, MemoryTerms]:
    """With full recomputation of no more layers than it takes to fit, where some fit neither without nor need all."""
    full = plans.recomputation == FULL
    none = np.flatnonzero(plans.recomputation == NONE)[np.cumsum(full) - 1]  # of the same plan, if it is full
    saved = memory.total[none] - memory.total
    share = np.clip((memory.total[none] - limit) / np.where(saved > 0, saved, 1), 0, 1)
    share = np.where(full & (saved > 0), share, 1.0)

    def mixed(terms: Terms) -> Terms:
        columns = [getattr(terms, one.name) for one in fields(terms)]
        return type(terms)(*(share * column + (1 - share) * column[none] for column in columns))

    return mixed(time), mixed(memory)


def calibrated(rows: Sequence[Row], calibration: Calibration) -> Calibration:
    """What the measured rows teach."""
    for row in rows:
        if row.measured_s:
            found = predict(row)
            calibration = calibration.observe(
                row.machine.device.name, row.tp, row.micro_batch or 1, row.measured_s, found.step_s
            )
    return calibration


def _plans(row: Row) -> Candidates:
    """The plan of the row; several where it leaves something open."""
    per_stage = max(1, row.devices // (row.tp * row.cp))
    stages = [row.pp] if row.pp else [pp for pp in range(1, row.model.layers + 1) if per_stage % pp == 0]
    sizes = [row.micro_batch] if row.micro_batch else [1, 2, 4]
    again = range(3) if row.recomputation is None else [row.recomputation]
    found = []
    for pp in stages:
        dp = max(1, per_stage // pp)
        split = split_layers(row.model.layers, pp)
        chunks = (
            [row.interleave] if row.interleave else [one for one in (1, 2, 3, 4) if pp > 1 and split[0] >= one] or [1]
        )
        shards, most = min(row.dp_shard or dp, dp), dp * row.cp * row.tp
        common = gcd(row.model.experts, most)
        experts = [min(row.ep, most)] if row.ep else [ep for ep in range(1, common + 1) if common % ep == 0]
        for size in sizes:
            passes = max(1, -(-row.global_batch // (dp * size)))
            middle = split[1] if pp > 2 else 0
            stages_of_zero = [row.zero] if row.zero is not None else [1] if pp > 1 else [1, 3]
            for interleave, zero, ep, recomputation in product(chunks, stages_of_zero, experts, again):
                found.append((
                    pp, interleave, dp // shards, shards, row.cp, row.tp, ep, zero, size, passes, recomputation,
                    split[0], middle, split[-1],
                ))  # fmt: skip
    return Candidates(*np.array(found, np.int64).T)
