"""`report.html` of a local run: one file that needs nothing else, no script and no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from orchestrator import ledger
from orchestrator.core.status import STAGES, IncidentStatus
from orchestrator.frontends.local import Run
from orchestrator.frontends.plot import Mark, loss_plot

NAME = "report.html"


def write_report(run: Run, undisturbed: Run | None, summary: dict[str, Any], sentence: str) -> Path:
    """Write it into the run's folder; `sentence` says how the comparison ended, or why there is none."""
    path = run.directory / NAME
    path.write_text(render(run, undisturbed, summary, sentence), encoding="utf-8")
    return path


def render(run: Run, undisturbed: Run | None, summary: dict[str, Any], sentence: str) -> str:
    """The report's HTML."""
    environment = Environment(
        loader=PackageLoader("orchestrator.frontends"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    plot = loss_plot(
        _losses(run.ledger),
        _losses(undisturbed.ledger) if undisturbed is not None else {},
        [_mark(one) for one in run.status.incidents],
    )
    # The plot is markup of our own whose texts are escaped where it is made.
    return environment.get_template(NAME).render(
        summary=summary,
        sentence=sentence,
        plot=Markup(plot),  # noqa: S704
        stages=[stage for stage in STAGES if any(stage in one["stages_s"] for one in summary["incidents"])],
    )


def _losses(directory: Path) -> dict[int, float]:
    return {step: record.loss for step, record in ledger.effective(directory).items() if record.loss is not None}


def _mark(one: IncidentStatus) -> Mark:
    resumed = f", resumed from step {one.resumed_step}" if one.resumed_step is not None else ""
    return Mark(
        one.failed_step, str(one.number), f"incident {one.number} at step {one.failed_step}: {one.cause}{resumed}"
    )
