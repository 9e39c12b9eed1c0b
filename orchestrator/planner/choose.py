"""Which of the estimated meshes is taken.

In this order: preferences of the job file, as far as they idle at most a tenth of the devices that could be used; the
previous mesh, while nothing is more than 5 % faster (changing it costs a conversion, and the estimate is no better
than that); among those within 5 % of the fastest, the one on most devices; the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import Mesh
from orchestrator.planner.estimate import Estimate

CLOSE = 1.05
"""Step times within this factor count as equal."""
_IDLE_AT_MOST = 0.1


@dataclass(frozen=True, slots=True)
class Choice:
    """The estimate taken; `relaxed` says in words which preferences were not met, `kept` that the mesh stays."""

    estimate: Estimate
    relaxed: tuple[str, ...]
    kept: bool
    ground: str
    """What speaks for it against a faster one: `preferred over` or `on more devices than`."""


def honoured(spec: JobSpec, mesh: Mesh) -> int:
    """How many preferences of the job file `mesh` meets."""
    return sum(bounds.prefer == getattr(mesh, axis) for axis, bounds in spec.parallelism.items())


def choose(spec: JobSpec, estimates: Sequence[Estimate], previous: Mesh | None) -> Choice:
    """One of `estimates` (not empty); equal ones are told apart by their mesh alone."""
    most = max(estimate.mesh.world_size for estimate in estimates)
    busy = [item for item in estimates if item.mesh.world_size >= most * (1 - _IDLE_AT_MOST)]
    best_met = max(honoured(spec, item.mesh) for item in busy)
    wanted = [item for item in busy if honoured(spec, item.mesh) == best_met] if best_met else list(estimates)
    fastest = min(item.step for item in wanted)
    close = [item for item in wanted if item.step <= fastest * CLOSE]
    kept = [item for item in close if item.mesh == previous]
    taken = min(kept or close, key=lambda item: (-item.mesh.world_size, item.step, _axes(item.mesh), item.mesh))
    return Choice(
        taken,
        _relaxed(spec, estimates, taken, most),
        bool(kept),
        "preferred over" if best_met else "on more devices than",
    )


def _axes(mesh: Mesh) -> int:
    return sum(size > 1 for size in mesh.sizes)


def _relaxed(spec: JobSpec, estimates: Sequence[Estimate], taken: Estimate, most: int) -> tuple[str, ...]:
    """Why each preference that `taken` does not meet was relaxed."""
    reasons = []
    for axis, bounds in spec.parallelism.items():
        if bounds.prefer is None or getattr(taken.mesh, axis) == bounds.prefer:
            continue
        sizes = [item.mesh.world_size for item in estimates if getattr(item.mesh, axis) == bounds.prefer]
        name = f"preferred {axis} {bounds.prefer}"
        if not sizes:
            reasons.append(f"{name} is not possible on {most} device{'' if most == 1 else 's'}")
        elif max(sizes) < most:
            reasons.append(f"{name} would leave {most - max(sizes)} of {most} devices idle")
        else:
            reasons.append(f"{name} does not go together with the other preferences")
    return tuple(reasons)
