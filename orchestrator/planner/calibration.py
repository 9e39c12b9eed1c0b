"""What measured steps say of the estimates: a factor per device, `tp` and micro-batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.core.errors import InvalidInput
from orchestrator.planner.candidates import Floats, Ints

REMEMBERED = 20.0
"""Measurements of one kind that count; older ones fade."""
PRIOR = 1.0
"""What a coarser kind's factor weighs beside a finer kind's own measurements, in measurements."""
MOST = 10.0
"""A measured step further off than this many times is not believed."""

Key = tuple[str, int, int]
"""Device, `tp` and micro-batch; 0 stands for any."""


@dataclass(frozen=True)
class Calibration:
    """Means of log(measured / predicted). A plan that was never measured takes its device's mean, then none."""

    seen: Mapping[Key, tuple[float, float]] = field(default_factory=dict)
    """Key -> (measurements, sum of their logarithms)."""

    def observe(self, device: str, tp: int, micro_batch: int, measured_s: float, predicted_s: float) -> Calibration:
        """With one more measurement of a step; `predicted_s` is the estimate without calibration."""
        if not (measured_s > 0 and predicted_s > 0) or not 1 / MOST < measured_s / predicted_s < MOST:
            return self
        log, seen = math.log(measured_s / predicted_s), dict(self.seen)
        for key in ((device, tp, micro_batch), (device, tp, 0), (device, 0, 0)):
            count, total = seen.get(key, (0.0, 0.0))
            fade = min(1.0, REMEMBERED / (count + 1))
            seen[key] = ((count + 1) * fade, (total + log) * fade)
        return Calibration(seen)

    def factor(self, device: str, tp: int, micro_batch: int) -> float:
        """What to multiply an estimate with."""
        log = 0.0
        for key in ((device, 0, 0), (device, tp, 0), (device, tp, micro_batch)):
            count, total = self.seen.get(key, (0.0, 0.0))
            # All plans of a device share its mean as it is: what was never measured must not look faster for it.
            prior = PRIOR if key[1] else 0.0
            log = (total + prior * log) / (count + prior) if count else log
        return math.exp(log)

    def factors(self, device: str, tp: Ints, micro_batch: Ints) -> Floats:
        """The factor of each plan."""
        if not any(name == device for name, *_ in self.seen):
            return np.ones(len(tp))
        most = int(micro_batch.max(initial=0)) + 1
        codes, places = np.unique(tp * most + micro_batch, return_inverse=True)
        return np.array([self.factor(device, int(code) // most, int(code) % most) for code in codes])[places]

    def to_data(self) -> dict[str, Any]:
        """For a JSON file."""
        rows = [[*key, count, total] for key, (count, total) in sorted(self.seen.items())]
        return {"calibration": 1, "factors": rows}

    @classmethod
    def from_data(cls, data: Any) -> Calibration:
        """Raises `InvalidInput` for what `to_data` did not make."""
        try:
            if data["calibration"] != 1:
                raise ValueError("it is of another version")
            seen = {}
            for device, tp, micro_batch, count, total in data["factors"]:
                if not (isinstance(device, str) and math.isfinite(count) and math.isfinite(total) and count > 0):
                    raise ValueError("a factor is no number")
                seen[device, int(tp), int(micro_batch)] = (float(count), float(total))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"not a calibration of regrow ({error}): give another file or remove it") from error
        return cls(seen)
