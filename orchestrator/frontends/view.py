"""What a person sees while a job runs: a live screen on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol, Self, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.core.status import Health, IncidentStatus, JobStatus, NodeStatus, Phase
from orchestrator.core.types import Plan

_HEALTH_STYLE = {Health.HEALTHY: "green", Health.SUSPECT: "yellow", Health.UNHEALTHY: "red", Health.LOST: "red"}
_PHASE_STYLE = {Phase.RUNNING: "bold green", Phase.SUCCEEDED: "bold green", Phase.FAILED: "bold red"}


class View(Protocol):
    """Where a run shows itself."""

    def __enter__(self) -> Self:
        """Begin to show."""

    def __exit__(self, *_: object) -> None:
        """Stop showing."""

    def show(self, status: JobStatus) -> None:
        """The job has changed."""

    def say(self, text: str) -> None:
        """Something happened to the cluster."""


def plan_text(plan: Plan | None, nodes: int | None = None) -> str:
    """For example `dp_shard 2 x tp 2 on 4 nodes`."""
    if plan is None:
        return "none"
    return str(plan.mesh) if nodes is None else f"{plan.mesh} on {nodes} node{'s' if nodes != 1 else ''}"


class Lines:
    """One line per change that matters: phases, incidents, commits, every tenth step."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started_s = time.monotonic()
        self._last: JobStatus | None = None
        self._next_step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        """Print one line with the seconds since the start."""
        print(f"[{time.monotonic() - self._started_s:7.2f} s] {text}", file=self._stream, flush=True)

    def show(self, status: JobStatus) -> None:
        """Print what is new."""
        last, self._last = self._last, status
        if last is None or (last.phase, last.reason) != (status.phase, status.reason):
            self.say(f"{status.phase}: {status.reason}")
        if status.plan is not None and (last is None or last.generation != status.generation):
            nodes = len(status.assignment.nodes) if status.assignment else None
            self.say(f"generation {status.generation}: {plan_text(status.plan, nodes)}")
        self._incidents(last.incidents if last is not None else (), status.incidents)
        if status.step < self._next_step - 10:
            self._next_step = status.step
        if status.step >= self._next_step and status.step > 0:
            self._next_step = status.step // 10 * 10 + 10
            self.say(_progress(status))
        if status.saving and (last is None or last.saving != status.saving):
            self.say(f"checkpoints {status.saving}")

    def _incidents(self, before: tuple[IncidentStatus, ...], now: tuple[IncidentStatus, ...]) -> None:
        closed = {one.number: one.closed_s is not None for one in before}
        decided = {one.number: one.decision for one in before}
        for one in now:
            if one.number not in closed:
                self.say(f"incident {one.number}: {one.cause}")
            if one.decision != decided.get(one.number, ""):
                self.say(f"incident {one.number}: {one.decision}")
            if one.closed_s is not None and not closed.get(one.number, False):
                self.say(f"incident {one.number} is over: {incident_text(one)}")


class Screen:
    """A live screen that is redrawn in place; what is said stays above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_s = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._drawn_s = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, status: JobStatus) -> None:
        """Redraw, at most four times a second."""
        now_s = time.monotonic()
        if now_s - self._drawn_s >= 0.25 or status.phase.ended:
            self._drawn_s = now_s
            self._live.update(render(status), refresh=True)

    def say(self, text: str) -> None:
        """Print one line above the screen."""
        self._console.print(Text(f"[{time.monotonic() - self._started_s:7.2f} s] {text}", style="dim"))


def create_view(quiet: bool) -> View:
    """The live screen when standard output is a terminal and not `quiet`; lines otherwise (on standard error if so)."""
    if sys.stdout.isatty() and not quiet:
        return Screen(Console())
    return Lines(sys.stderr if quiet else sys.stdout)


def render(status: JobStatus) -> RenderableType:
    """The whole status: job, nodes, incidents, and the traceback of a failed job."""
    head = Text.assemble(
        (f"{status.name}  ", "bold"),
        (str(status.phase), _PHASE_STYLE.get(status.phase, "bold yellow")),
        f"  {status.reason}\n",
        f"generation {status.generation}  {plan_text(status.plan)}\n",
        _progress(status),
        f"\ncheckpoints {status.saving}" if status.saving else "",
        f"\n{ladder_text(status)}" if status.ladder else "",
    )
    parts: list[RenderableType] = [head, _nodes(status.nodes)]
    if status.incidents:
        parts.append(_incidents_table(status.incidents[-6:]))
    if status.failure is not None:
        where = "" if status.failure.rank is None else f" (rank {status.failure.rank} on {status.failure.node})"
        parts.append(Text(f"failed{where}: {status.failure.reason}", style="bold red"))
        parts.append(Text(status.failure.traceback.rstrip()))
    return Group(*parts)


def _progress(status: JobStatus) -> str:
    loss = "-" if status.loss is None else f"{status.loss:.5f}"
    committed = "-" if status.committed_step is None else status.committed_step
    return f"step {status.step}  loss {loss}  committed step {committed}"


def _nodes(nodes: tuple[NodeStatus, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    racks = any(node.rack for node in nodes)
    for column in ("node", *(["rack"] if racks else []), "verdict", "devices", "ranks", "step", "why"):
        table.add_column(column, overflow="fold")
    for node in nodes:
        verdict = Text(str(node.verdict.health), style=_HEALTH_STYLE[node.verdict.health])
        if node.drained:
            verdict.append(" drained", style="yellow")
        devices = f"{node.used_devices}/{node.devices}" + (f" at {node.speed:g}x" if node.speed != 1 else "")
        ranks = ",".join(map(str, node.ranks)) or "-"
        where = [Text(node.rack or "-")] if racks else []
        step = str(node.step) if node.ranks else "-"
        table.add_row(node.node, *where, verdict, devices, ranks, step, node.verdict.reason)
    return table


def _incidents_table(incidents: tuple[IncidentStatus, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("incident", "cause", "recovery"):
        table.add_column(column, overflow="fold")
    for one in incidents:
        came = incident_text(one) if one.closed_s is not None else "under way"
        table.add_row(str(one.number), one.cause, f"{came}\n{one.decision}" if one.decision else came)
    return table


def ladder_text(status: JobStatus) -> str:
    """What would follow a loss, in one line."""
    rungs = []
    for one in status.ladder:
        speed = ""
        if one.plan is not None and status.plan is not None and one.plan.step_s > 0 and status.plan.step_s > 0:
            speed = f", {status.plan.step_s / one.plan.step_s:.2f}x the speed"
        follows = "no legal plan" if one.plan is None else f"{plan_text(one.plan, one.nodes)}{speed}"
        rungs.append(f"{one.losses} lost: {follows}")
    return f"ready for losses: {'; '.join(rungs)}"


def incident_text(one: IncidentStatus) -> str:
    """What came of an incident, in one line."""
    change = f"{plan_text(one.from_plan, one.from_nodes)} -> {plan_text(one.to_plan, one.to_nodes)}"
    lost = f"{one.lost_steps} step{'s' if one.lost_steps != 1 else ''} lost"
    return f"{change}, {one.recovery_s:.2f} s, {lost}"
