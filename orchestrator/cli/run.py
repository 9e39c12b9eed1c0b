"""`regrow run`."""

from __future__ import annotations

import json as jsonlib
import re
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from orchestrator.cli.options import JobFile, Json
from orchestrator.core.errors import InvalidInput

_NODES = "Nodes, called node-0 and so on; 4x2 = four nodes of two devices each."
_FAIL = (
    'A fault: WHAT@WHEN. WHAT: "node-2" or "node-2,node-3" (lost until it returns), "worker:node-1" (killed), '
    '"hang:node-1" (a worker stopped), "agent:node-1", "controller" (killed, started again). '
    'WHEN: "step=40", "t=12.5" (seconds since the start), "phase=STARTING#2" (second entry). Repeatable.'
)
_RETURN = 'A lost node comes back, for example "node-2@step=80". Repeatable.'
_COMPARE = "Also run the job undisturbed and compare every loss and sample."


def run(
    job: JobFile,
    /,
    *,
    nodes: Annotated[str, Parameter(help=_NODES)] = "4",
    fail: Annotated[list[str] | None, Parameter(negative="", help=_FAIL)] = None,
    return_: Annotated[list[str] | None, Parameter(name="--return", negative="", help=_RETURN)] = None,
    compare: Annotated[bool, Parameter(negative="", help=_COMPARE)] = False,
    seed: Annotated[int | None, Parameter(help="Use this seed instead of the job file's.")] = None,
    runs_dir: Annotated[Path, Parameter(help="Where the run gets its folder NAME-N.")] = Path("runs"),
    keep_checkpoint_uri: Annotated[
        bool, Parameter(negative="", help="Save where the job file says instead of in the run's folder.")
    ] = False,
    json: Json = False,
) -> int:
    """Run a job on this machine: a controller and one real agent per node as child processes, which all end with it.

    Checkpoints go to the run's folder, so that every run starts afresh (see --keep-checkpoint-uri).

    Example: regrow run job.yaml --nodes 4 --fail "node-2@step=40" --return "node-2@step=80" --compare
    """
    from orchestrator import jobfile
    from orchestrator.frontends import faults, session
    from orchestrator.frontends.view import create_view

    spec = jobfile.load(job)
    cluster = _nodes(nodes)
    schedule = faults.parse(fail or [], return_ or [], list(cluster))
    if seed is not None and seed < 0:
        raise InvalidInput(f"--seed is {seed}: give a number of at least 0")
    view = create_view(quiet=json)
    wanted = session.Wanted(spec, cluster, schedule, runs_dir, seed, keep_checkpoint_uri, compare)
    result = session.run(wanted, view)
    if json:
        print(jsonlib.dumps(result.summary, allow_nan=False))
    else:
        session.show(result)
    sys.stdout.flush()
    if result.sentence:
        print(f"regrow: {result.sentence}", file=sys.stderr)
    return result.exit_code


def _nodes(text: str) -> dict[str, int]:
    match = re.fullmatch(r"([1-9]\d{0,2})(?:x([1-9]\d{0,2}))?", text.strip())
    if match is None:
        raise InvalidInput(
            f"--nodes {text!r} cannot be read: give a number of nodes such as 4, or 4x2 for two devices each"
        )
    return {f"node-{number}": int(match[2] or 1) for number in range(int(match[1]))}
