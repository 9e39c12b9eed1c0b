"""`regrow plan`."""

from __future__ import annotations

import json as jsonlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from orchestrator.cli.options import Json
from orchestrator.core.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.core.types import NodeCapacity
    from orchestrator.planner import Candidate, Infeasible, Planned
    from orchestrator.planner.calibration import Calibration

_NODES = (
    "Nodes x devices : kind, for example 7x8:h100, or 3x8:h100,1x4:h100. Kind: a name of the catalogue; else cpu. "
    "@0.7 behind it: they run at so much of their usual speed, for example 7x8:h100,1x8:h100@0.7. "
    "/NAME at the end: they stand in that rack, for example 16x8:h100/rack-a,16x8:h100/rack-b."
)
_LOSE = "Then lose these nodes: a number of them, or names (node-3,node-5). Repeatable for one loss after another."
_LADDER = "Then the plans for so many losses more, as a running job has them ready."
_EVALUATE = "Instead of planning: a table (CSV) of measured runs; predictions are shown beside them. Repeatable."
_CALIBRATE = "With --evaluate: add what the measured steps teach to this file."
_CALIBRATION = "Correct estimates by what --calibrate or a running job has kept in this file."
_GROUP = re.compile(
    r"([1-9]\d{0,4})(?:x([1-9]\d{0,3}))?(?::([A-Za-z0-9][\w .-]*))?(?:@(0?\.\d{1,3}|1(?:\.0)?))?"
    r"(?:/([A-Za-z0-9][A-Za-z0-9._-]{0,252}))?"
)


def plan(
    job: Annotated[Path | None, Parameter(help="The job file; none with --evaluate.")] = None,
    /,
    *,
    nodes: Annotated[str | None, Parameter(help=_NODES)] = None,
    lose: Annotated[list[str] | None, Parameter(negative="", help=_LOSE)] = None,
    ladder: Annotated[int, Parameter(help=_LADDER, validator=Number(gte=0))] = 0,
    evaluate: Annotated[list[Path] | None, Parameter(negative="", help=_EVALUATE)] = None,
    calibrate: Annotated[Path | None, Parameter(help=_CALIBRATE)] = None,
    calibration: Annotated[Path | None, Parameter(help=_CALIBRATION)] = None,
    json: Json = False,
) -> None:
    """Rank the plans for a job on a set of nodes, and the plans after losses; every plan says why.

    Example: regrow plan job.yaml --nodes 7x8:h100 --lose node-3 --ladder 4

    With --evaluate it compares predicted with measured step times and memory of given plans, one a line. Columns:
    row_id, model (a known name) or layers, hidden, heads, kv_heads, ffn_hidden, gated, tied, vocab; seq, gpu, n_gpus,
    tp, pp, vpp, cp, ep, fsdp, zero_stage, mbs, gbs, recompute, precision, schedule, interconnect; and as measured:
    iter_time_s, or tokens_per_s_per_gpu, or tflops_per_gpu with tflops_kind; mem_gib; oom (1 = ran out of memory).
    Needed are gpu, n_gpus, gbs and the model; the README says more.

    Example: regrow plan --evaluate rows.csv --calibrate learnt.json
    """
    from orchestrator.cli import evaluate as tables
    from orchestrator.planner.calibration import Calibration

    learnt = tables.load(calibration) if calibration else Calibration()
    if evaluate:
        if job is not None or nodes is not None or lose or ladder:
            raise InvalidInput("--evaluate takes no job file, --nodes, --lose or --ladder: leave them out")
        tables.evaluate(evaluate, learnt, calibrate, json)
        return
    if calibrate is not None:
        raise InvalidInput("--calibrate is for --evaluate: name a table of measured runs with it")
    if job is None or nodes is None:
        missing = "the job file is" if job is None else "--nodes is"
        raise InvalidInput(f"{missing} missing: give regrow plan JOB.yaml --nodes 7x8:h100, or --evaluate ROWS.csv")
    _plan(job, nodes, lose or [], ladder, learnt, json)


def _plan(job: Path, nodes: str, lose: Sequence[str], ladder: int, learnt: Calibration, json: bool) -> None:
    from rich.console import Console

    from orchestrator import jobfile, planner
    from orchestrator.cli.plan_tables import show, show_ladder

    spec = jobfile.load(job)
    capacity = capacity_of(nodes)
    found = _found(planner.plan(spec, capacity, calibration=learnt))
    rounds = [("at first", found)]
    for text in lose:
        gone = _lost(text, [node.node for node in capacity])
        capacity = [node for node in capacity if node.node not in gone]
        found = _found(planner.plan(spec, capacity, found.plan, found.assignment, learnt))
        rounds.append((f"without {', '.join(gone)}", found))
    rungs = planner.ladder(spec, capacity, found, ladder, learnt)
    if json:
        shown = {"rounds": [{"when": when} | _data(one) for when, one in rounds]}
        print(jsonlib.dumps(shown | {"ladder": [_rung(losses, rung) for losses, rung in enumerate(rungs, 1)]}))
        return
    console = Console()
    for when, one in rounds:
        show(console, when, one)
    if rungs:
        show_ladder(console, found, rungs)


def capacity_of(text: str) -> list[NodeCapacity]:
    """The nodes that `7x8:h100,1x4:a100` stands for, called node-0 and so on; raises `InvalidInput`."""
    from orchestrator.core.types import NodeCapacity
    from orchestrator.planner.hardware import CATALOGUE, find

    found: list[NodeCapacity] = []
    for group in text.split(","):
        match = _GROUP.fullmatch(group.strip())
        if match is None:
            raise InvalidInput(
                f"--nodes {text!r} cannot be read: write nodes x devices : kind @ speed up to 1 / rack, "
                "for example 7x8:h100 or 7x8:h100/rack-a"
            )
        kind = match[3] or "cpu"
        device = find(kind)
        if device is None:
            raise InvalidInput(f"--nodes {text!r} names the unknown device {kind!r}: known are {', '.join(CATALOGUE)}")
        first = len(found)
        names = [f"node-{number}" for number in range(first, first + int(match[1]))]
        speed = float(match[4] or 1)
        if not speed:
            raise InvalidInput(f"--nodes {text!r} has nodes of speed 0: leave them out")
        devices, rack = int(match[2] or 1), match[5] or ""
        found += [NodeCapacity(name, devices, device.memory_bytes, device.name, speed, rack) for name in names]
    return found


def _lost(text: str, names: list[str]) -> list[str]:
    if text.strip().isdecimal():
        if not 0 < int(text) < len(names):
            raise InvalidInput(f"--lose {text!r}: of {len(names)} nodes, lose at least one and leave at least one")
        return names[-int(text) :]
    gone = [name.strip() for name in text.split(",")]
    if unknown := [name for name in gone if name not in names]:
        known = ", ".join(names if len(names) <= 8 else [*names[:3], "...", names[-1]])
        raise InvalidInput(f"--lose {text!r} names {unknown[0]!r}, but the nodes are {known}")
    return gone


def _found(answer: Any) -> Planned:
    from orchestrator.planner import Infeasible, Planned

    if isinstance(answer, Infeasible):
        raise InvalidInput(answer.reason)
    assert isinstance(answer, Planned)
    return answer


def _data(found: Planned) -> dict[str, Any]:
    from orchestrator import wire

    return {
        "plan": wire.to_data(found.plan),
        "assignment": wire.to_data(found.assignment),
        "chosen": _candidate(found.chosen),
        "alternatives": [_candidate(one) for one in found.alternatives],
        "rejected": [{"what": one.what, "reason": one.reason} for one in found.rejected],
        "weighed": found.weighed,
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    """The plan and what is estimated of it: seconds of a step and bytes of a device by term."""
    from orchestrator import wire

    estimated = {"seconds": dict(one.seconds), "memory": dict(one.memory)}
    speed = {"tokens_per_s": one.tokens_per_s, "mfu": one.mfu, "lost": one.lost}
    return {**wire.to_data(one.plan), **estimated, **speed}


def _rung(losses: int, rung: Planned | Infeasible) -> dict[str, Any]:
    from orchestrator.planner import Infeasible

    if isinstance(rung, Infeasible):
        return {"lost": losses, "infeasible": rung.reason, "needs": rung.needs}
    return {"lost": losses} | _data(rung)
