"""What a simulation found, for people: a table on the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table

from orchestrator.core.errors import InvalidInput
from orchestrator.simulation.account import CAUSES
from orchestrator.simulation.study import Result, Study, Summary, summarize

TEMPLATE = "simulation.html"
_WIDTH, _BAR, _GAP, _LEFT = 960, 30, 16, 110


def heading(study: Study, source: str) -> str:
    """What was simulated, in one line."""
    seeds = len(study.seeds)
    return (
        f"{study.job.name} on {len(study.nodes)} nodes of {study.nodes[0].devices} {study.nodes[0].kind}, "
        f"{study.days:g} days, failures: {source}, {seeds} seed{'s' if seeds != 1 else ''}"
    )


def show(study: Study, results: Sequence[Result], source: str) -> None:
    """Print the table of policies."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=heading(study, source), title_justify="left")
    table.add_column("policy")
    columns = ("goodput", "spread", "ETTR", *CAUSES[1:], "interruptions", "changes", "device-hours lost")
    for column in columns:
        table.add_column(column, justify="right")
    for one in summarize(study, results):
        lost = one.device_hours - one.useful_device_hours
        shares = [percent(one.shares[cause]) for cause in CAUSES[1:]]
        counts = [f"{one.interruptions:.0f}", f"{one.changes:.0f}", f"{lost:,.0f}"]
        row = [percent(one.goodput), f"±{100 * one.spread:.2f}", percent(one.ettr), *shares, *counts]
        table.add_row(one.policy.name, *row)
    console = Console()
    console.print(table if console.is_terminal and console.width > 150 else _upright(study, results, source))


def _upright(study: Study, results: Sequence[Result], source: str) -> Table:
    """The same with a column for each policy, for narrow screens and files."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=heading(study, source), title_justify="left")
    table.add_column("")
    found = summarize(study, results)
    for one in found:
        table.add_column(one.policy.name, justify="right")
    table.add_row("goodput", *(percent(one.goodput) for one in found))
    table.add_row("  over seeds", *(f"±{100 * one.spread:.2f}" for one in found))
    table.add_row("ETTR", *(percent(one.ettr) for one in found))
    for cause in CAUSES[1:]:
        table.add_row(cause, *(percent(one.shares[cause]) for one in found))
    table.add_row("interruptions", *(f"{one.interruptions:.0f}" for one in found))
    table.add_row("planned changes", *(f"{one.changes:.0f}" for one in found))
    table.add_row("device-hours lost", *(f"{one.device_hours - one.useful_device_hours:,.0f}" for one in found))
    return table


def percent(share: float) -> str:
    """`97.12 %`."""
    return f"{100 * share:.2f} %"


def write_report(path: Path, study: Study, results: Sequence[Result], source: str) -> None:
    """Write the HTML report; raises `InvalidInput` when the file cannot be written."""
    text = render(study, results, source)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"--report {path} cannot be written ({error.strerror}): give another file") from error


def render(study: Study, results: Sequence[Result], source: str) -> str:
    """The report's HTML: the same for the same results, byte for byte."""
    environment = Environment(
        loader=PackageLoader("orchestrator.frontends"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    found = summarize(study, results)
    # The plots are markup of our own whose texts are escaped where they are made.
    return environment.get_template(TEMPLATE).render(
        heading=heading(study, source),
        source=study.failures.source if study.failures else f"capacity trace {source}",
        timing={name: getattr(study.timing, name) for name in study.timing.__slots__},
        summaries=found,
        causes=CAUSES,
        percent=percent,
        bars=Markup(_bars(found)),  # noqa: S704
        seeds=Markup(_seeds(found, results)),  # noqa: S704
    )


def _bars(found: Sequence[Summary]) -> str:
    """A stacked bar for each policy."""
    height = len(found) * (_BAR + _GAP) + _GAP
    parts = []
    for row, one in enumerate(found):
        y, x = _GAP + row * (_BAR + _GAP), float(_LEFT)
        parts.append(
            f'<text x="{_LEFT - 10}" y="{y + _BAR / 2 + 4:.1f}" text-anchor="end">{escape(one.policy.name)}</text>'
        )
        for number, cause in enumerate(CAUSES):
            width = one.shares[cause] * (_WIDTH - _LEFT)
            title = f"{one.policy.name}: {cause} {percent(one.shares[cause])}"
            parts.append(
                f'<rect class="c{number}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BAR}">'
                f"<title>{escape(title)}</title></rect>"
            )
            x += width
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="time by cause">{"".join(parts)}</svg>'


def _seeds(found: Sequence[Summary], results: Sequence[Result]) -> str:
    """The goodput of every seed as a dot, a line for each policy."""
    low = max(0.0, min(one.least for one in found) - 0.02)
    height = len(found) * (_BAR + _GAP) + 2 * _GAP
    across = (_WIDTH - _LEFT - 20) / max(1e-9, 1 - low)
    parts = []
    for tick in range(11):
        value = low + (1 - low) * tick / 10
        x = _LEFT + (value - low) * across
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 2 * _GAP}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - _GAP}" text-anchor="middle">{100 * value:.1f}</text>')
    for row, one in enumerate(found):
        y = _GAP + row * (_BAR + _GAP) + _BAR / 2
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(one.policy.name)}</text>')
        for result in results:
            if result.policy == one.policy.name:
                x = _LEFT + (result.goodput - low) * across
                title = f"seed {result.seed}: {percent(result.goodput)}"
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(title)}</title></circle>')
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="goodput by seed">{"".join(parts)}</svg>'
