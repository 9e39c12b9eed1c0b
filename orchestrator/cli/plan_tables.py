"""What `regrow plan` prints: a ranking, where time and memory go, why the others lost, and the ladder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.core.types import AXES, Recomputation

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.planner import Candidate, Infeasible, Planned

SHOWN = 6
"""Plans in the tables; all are in the JSON."""
_SHORT = {"dp_replicate": "repl", "dp_shard": "shard"}
_BATCH = ("devices", "samples", "batch", "recompute")
_TERMS = {
    **{"data": "data-par.", "optimizer": "optim."},
    **{"parameters": "gathered", "in_flight": "in flight", "communication": "buffers", "constant": "fixed"},
}


def show(console: Console, when: str, found: Planned) -> None:
    """One plan with its runners-up."""
    from rich.text import Text

    from orchestrator.planner.explain import HELD, SPENT

    console.print(Text.assemble((f"{when}: ", "bold"), (str(found.plan.mesh), "bold green"), f"\n{found.plan.reason}"))
    ranked = [found.chosen, *found.alternatives][:SHOWN]
    _ranking(ranked).show(console)
    if found.chosen.seconds:
        _terms("step, seconds", [one.seconds for one in ranked], 1, SPENT).show(console)
        unit, size = _unit(ranked)
        _terms(f"memory, {unit}", [one.memory for one in ranked], size, HELD).show(console)
    for number, one in enumerate(ranked[1:], 2):
        console.print(Text(f"{number} {_verdict(one, found.chosen)}"))
    if len(found.alternatives) >= SHOWN:
        console.print(Text(f"{len(found.alternatives) - SHOWN + 1} more with --json", style="dim"))
    for rejection in found.rejected:
        console.print(Text(f"not {rejection.what}: {rejection.reason}", style="dim"))


def show_ladder(console: Console, found: Planned, rungs: Sequence[Planned | Infeasible]) -> None:
    """The plans for the next losses."""
    from rich.text import Text

    from orchestrator.planner import Infeasible

    grid = Grid(["lost", "mesh", "devices", "batch", "recompute", "step", "speed"])
    for losses, rung in enumerate(rungs, 1):
        if isinstance(rung, Infeasible):
            grid.rows.append([str(losses), "none", "", "", "", "", ""])
            continue
        one = rung.chosen
        speed = f"{found.plan.step_s / one.plan.step_s:.0%}" if one.plan.step_s else "-"
        grid.rows.append(
            [str(losses), str(one.plan.mesh), str(one.devices), _batch(one), _recompute(one), _step(one), speed]
        )
    console.print(Text("ladder: the plan when so many more nodes are lost at once", style="bold"))
    grid.show(console)
    for losses, rung in enumerate(rungs, 1):
        if isinstance(rung, Infeasible):
            console.print(Text(f"{losses} lost: {rung.reason}"))
            break


@dataclass(slots=True)
class Grid:
    """Columns with two spaces between, so that a plan's line fits a terminal; numbers to the right."""

    columns: Sequence[str]
    left: frozenset[str] = frozenset({"mesh", "recompute"})
    rows: list[Sequence[str]] = field(default_factory=list)

    def show(self, console: Console) -> None:
        """Print it, and an empty line."""
        from rich.text import Text

        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        for number, row in enumerate([self.columns, *self.rows]):
            cells = [
                cell.ljust(width) if at == 0 or column in self.left else cell.rjust(width)
                for at, (cell, width, column) in enumerate(zip(row, widths, self.columns, strict=True))
            ]
            console.print(Text("  ".join(cells).rstrip(), style="dim" if number == 0 else ""), soft_wrap=True)
        console.print()


def _ranking(ranked: Sequence[Candidate]) -> Grid:
    """One line per plan; axes that no plan uses are left out."""
    axes = [axis for axis in (*AXES, "ep") if any(getattr(one.plan.mesh, axis) > 1 for one in ranked)]
    chunks = any(one.plan.interleave > 1 for one in ranked)
    unit, size = _unit(ranked)
    estimated = (unit, "step", "tokens/s", "MFU") if ranked[0].seconds else ()
    layers = any(len(one.plan.stage_layers) > 1 for one in ranked)
    extra = [*(["layers"] if layers else []), *(["chunks"] if chunks else [])]
    grid = Grid(["", *(_SHORT.get(axis, axis) for axis in axes), *extra, *_BATCH, *estimated])
    for number, one in enumerate(ranked, 1):
        sizes = [str(getattr(one.plan.mesh, axis)) for axis in axes]
        samples = "/".join(str(size) for size in sorted(set(one.plan.batch.samples), reverse=True))
        stages = [_layers(one), str(one.plan.interleave)]
        row = [*sizes, *stages[not layers : 1 + chunks], str(one.devices), samples, _batch(one), _recompute(one)]
        values = [f"{one.plan.memory_bytes / size:.1f}", _step(one), _count(one.tokens_per_s), f"{one.mfu:.1%}"]
        grid.rows.append([_mark(number), *row, *values[: len(estimated)]])
    return grid


def _terms(title: str, rows: Sequence[Mapping[str, float]], size: float, known: Iterable[str]) -> Grid:
    """Terms that are 0 in every plan are left out."""
    names = [name for name in known if any(name in row for row in rows)]
    grid = Grid([title, *(_TERMS.get(name, name) for name in names)], frozenset())
    for number, row in enumerate(rows, 1):
        cells = [f"{row[name] / size:.3g}" if name in row else "-" for name in names]
        grid.rows.append([_mark(number), *cells])
    return grid


def _unit(ranked: Sequence[Candidate]) -> tuple[str, int]:
    """In what memory is told."""
    return ("GiB", 2**30) if max(one.plan.memory_bytes for one in ranked) >= 2**30 else ("MiB", 2**20)


def _mark(number: int) -> str:
    return "*" if number == 1 else str(number)


def _batch(one: Candidate) -> str:
    return f"{one.plan.batch.micro_batches}x{one.plan.batch.micro_batch}"


def _layers(one: Candidate) -> str:
    """Of the first stage, of the fullest between, of the last: `7/8/7`."""
    stages = one.plan.stage_layers
    return "/".join(map(str, [stages[0], max(stages[1:-1]), stages[-1]] if len(stages) > 2 else stages))


def _recompute(one: Candidate) -> str:
    return str(one.plan.recomputation) if one.plan.recomputation is not Recomputation.NONE else "-"


def _step(one: Candidate) -> str:
    return f"{one.plan.step_s:.4g} s" if one.plan.step_s else "-"


def _count(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _verdict(one: Candidate, chosen: Candidate) -> str:
    """Why a runner-up is not the plan."""
    if not one.plan.step_s:
        return one.plan.reason
    ratio = one.plan.step_s / chosen.plan.step_s
    much = f"{abs(ratio - 1):.1%}"
    if ratio < 0.9995:
        return f"is {much} faster, but not preferred: {one.plan.mesh}"
    if ratio <= 1.0005:
        return f"is as fast: {one.plan.mesh}"
    return f"lost by {much}: {one.lost}"
