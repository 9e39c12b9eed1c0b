"""One `regrow run` from end to end: the run, the undisturbed one beside it, the report and the summary."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.core.errors import InvalidInput
from orchestrator.core.spec import JobSpec
from orchestrator.core.status import STAGES, JobStatus, Phase
from orchestrator.frontends import local, report
from orchestrator.frontends.faults import Fault
from orchestrator.frontends.summary import Compared, compare, summarize, verdict
from orchestrator.frontends.view import View, plan_text

_FILE_WIDTH = 120
"""Columns of the tables when standard output is no terminal."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for."""

    spec: JobSpec
    nodes: Mapping[str, int]
    """Devices by node."""
    faults: Sequence[Fault]
    runs_dir: Path
    seed: int | None
    keep_checkpoint_uri: bool
    compare: bool


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it."""

    summary: dict[str, Any]
    status: JobStatus
    compared: Compared | None
    exit_code: int
    sentence: str
    """What went wrong; empty when nothing did."""


def run(wanted: Wanted, view: View) -> Result:
    """Run the job with its faults and, if wanted, once more without; write the report."""
    try:
        directory = local.new_directory(wanted.runs_dir, wanted.spec.name)
    except OSError as error:
        raise InvalidInput(
            f"no folder can be made in {wanted.runs_dir} ({error.strerror}): choose another --runs-dir"
        ) from error
    with view:
        view.say(f"the run's folder is {directory}; checkpoints go to {_checkpoints(wanted, directory)}")
        keep = wanted.keep_checkpoint_uri
        spec = local.prepared(wanted.spec, directory, seed=wanted.seed, keep_checkpoint_uri=keep)
        disturbed = local.run(spec, wanted.nodes, wanted.faults, directory, view)
        for text in disturbed.never:
            view.say(f"{text!r} never happened: its time did not come before the job ended")
        undisturbed = None
        if wanted.compare and disturbed.status.phase is Phase.SUCCEEDED:
            view.say("the same job once more, undisturbed, to compare with")
            undisturbed = _undisturbed(wanted, directory / "undisturbed", view)
    compared = compare(disturbed, undisturbed) if undisturbed is not None else None
    exit_code, sentence = verdict(disturbed, compared)
    summary = summarize(disturbed, compared, str(disturbed.directory / report.NAME))
    report.write_report(disturbed, undisturbed, summary, compared.sentence if compared is not None else sentence)
    return Result(summary, disturbed.status, compared, exit_code, sentence)


def _undisturbed(wanted: Wanted, directory: Path, view: View) -> local.Run:
    """From scratch and in folders of its own, whatever the first one used."""
    spec = local.prepared(wanted.spec, directory, seed=wanted.seed, keep_checkpoint_uri=False)
    return local.run(spec, wanted.nodes, (), directory, view)


def _checkpoints(wanted: Wanted, directory: Path) -> str:
    if wanted.keep_checkpoint_uri:
        return wanted.spec.checkpoint.uri
    return f"{directory / 'checkpoints'} (--keep-checkpoint-uri uses {wanted.spec.checkpoint.uri})"


def show(result: Result) -> None:
    """Print the summary for a person."""
    console = Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)
    status = result.status
    if status.incidents:
        console.print(_causes(status), _seconds(status))
    else:
        console.print("no incident")
    console.print(Text(f"job {status.name} {status.phase} at step {status.step} in generation {status.generation}"))
    if result.compared is not None and result.compared.equal:
        console.print(Text(result.compared.sentence))
    console.print(Text(f"report: {result.summary['report']}"))
    if status.failure is not None and status.failure.traceback:
        console.print(Text(status.failure.traceback.rstrip()))


def _causes(status: JobStatus) -> Table:
    table = Table(title="incidents", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("#")
    for column in ("cause", "plan before -> after, and why"):
        table.add_column(column, overflow="fold")
    for one in status.incidents:
        change = f"{plan_text(one.from_plan, one.from_nodes)} -> {plan_text(one.to_plan, one.to_nodes)}"
        why = f"{one.decision}\n{one.reason}" if one.decision else one.reason
        table.add_row(str(one.number), Text(one.cause), Text.assemble((change, "bold"), f"\n{why}"))
    return table


def _seconds(status: JobStatus) -> Table:
    table = Table(title="seconds by stage", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("#")
    for column in (*STAGES, "recovery", "steps lost"):
        table.add_column(column.replace("_", " "), justify="right")
    for one in status.incidents:
        stages = [f"{one.stages_s[stage]:.2f}" if stage in one.stages_s else "-" for stage in STAGES]
        recovery = f"{one.recovery_s:.2f}" if one.closed_s is not None else "not over"
        table.add_row(str(one.number), *stages, recovery, str(one.lost_steps))
    return table
