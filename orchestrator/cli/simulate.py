"""`regrow simulate`."""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from orchestrator.cli.options import JobFile, Json
from orchestrator.core.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.simulation.failures import FailureModel
    from orchestrator.simulation.study import Result, Study

_NODES = "Nodes x devices : kind, all alike, for example 2048x8:h100; in racks: 16x8:h100/a,16x8:h100/b."
_FAILURES = "A failure model by name: llama3 (unless another is given), rsc1, rsc2, opt175b, spot, racks or none."
_TRACE = "A capacity trace instead: a CSV file with t_s and available_nodes (or available_gpus, or nodes_after)."
_POLICY = "Only this policy: regrow, baseline, wait, spares, equal or interval. Repeatable."
_SPARES = "Nodes that the policies baseline and spares hold back; else a fiftieth."
_RATE = "Node failures per 1000 node-days instead of the model's."
_REPAIR = "Mean hours until a lost node is back instead of the model's."


def simulate(
    job: JobFile,
    /,
    *,
    nodes: Annotated[str, Parameter(help=_NODES)],
    failures: Annotated[str | None, Parameter(help=_FAILURES)] = None,
    trace: Annotated[Path | None, Parameter(help=_TRACE)] = None,
    days: Annotated[float, Parameter(help="Days to simulate.", validator=Number(gt=0, lte=3660))] = 54.0,
    seeds: Annotated[int, Parameter(help="So many seeds, 1, 2, ...", validator=Number(gte=1, lte=1000))] = 3,
    policy: Annotated[list[str] | None, Parameter(negative="", help=_POLICY)] = None,
    spares: Annotated[int | None, Parameter(help=_SPARES, validator=Number(gte=0))] = None,
    rate: Annotated[float | None, Parameter(help=_RATE, validator=Number(gte=0))] = None,
    repair_hours: Annotated[float | None, Parameter(help=_REPAIR, validator=Number(gt=0))] = None,
    report: Annotated[Path | None, Parameter(help="Also write an HTML report with plots here.")] = None,
    json: Json = False,
) -> None:
    """Try policies on a simulated cluster: the real decisions and plans in virtual time, under seeded failures.

    Example: regrow simulate job.yaml --nodes 2048x8:h100 --failures llama3 --days 54 --report simulation.html
    """
    from orchestrator import jobfile
    from orchestrator.cli.plan import capacity_of
    from orchestrator.frontends import simulation
    from orchestrator.simulation import policies, study, traces

    capacity = tuple(capacity_of(nodes))
    if trace and any(one is not None for one in (failures, rate, repair_hours)):
        raise InvalidInput("--trace says what happens to nodes: leave out --failures, --rate and --repair-hours")
    source = trace.name if trace else failures or "llama3"
    model = None if trace else _model(source, rate, repair_hours)
    steps = traces.parse_trace(_read(trace), trace.name, capacity[0].devices) if trace else []
    names = policy or list(policies.POLICIES)
    chosen = [policies.named(name) for name in dict.fromkeys(names)]
    if spares is not None:
        chosen = [replace(one, spares=spares / len(capacity)) if one.spares else one for one in chosen]
        if spares >= len(capacity):
            raise InvalidInput(f"--spares is {spares} of {len(capacity)} nodes: leave some to train on")
    wanted = study.Study(
        jobfile.load(job), capacity, tuple(chosen), days, tuple(range(1, seeds + 1)), model, tuple(steps)
    )
    with _progress(wanted) as done:
        results = study.run(wanted, os.cpu_count() or 1, done)
    if report is not None:
        simulation.write_report(report, wanted, results, source)
    if json:
        print(jsonlib.dumps(study.to_data(wanted, results), allow_nan=False))
    else:
        simulation.show(wanted, results, source)


def _model(name: str, rate: float | None, repair_hours: float | None) -> FailureModel:
    from orchestrator.simulation.failures import HOUR_S, preset

    model = preset(name)
    if rate is not None:
        model = replace(model, per_1000_node_days=rate)
    if repair_hours is not None:
        repair_s = repair_hours * HOUR_S
        model = replace(model, repair_s=repair_s, repair_least_s=min(model.repair_least_s, repair_s / 2))
    return model


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InvalidInput(f"--trace {path} cannot be read ({reason}): give a CSV file") from error


@contextmanager
def _progress(wanted: Study) -> Iterator[Callable[[Result], None]]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=len(wanted.policies) * len(wanted.seeds))
        yield lambda one: bars.advance(task)
