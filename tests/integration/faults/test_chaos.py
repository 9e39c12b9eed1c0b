"""A schedule of faults that nobody chose: random in time and kind. `REGROW_CHAOS_SEED` repeats one."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.integration.faults.conftest import NODES, FaultRun, Submit, Undisturbed
from tests.integration.faults.test_faults import recovered
from tests.integration.local.harness import JobOptions

OPTIONS = JobOptions(steps=500, interval="10 steps")
FAULTS = 8
PAUSE_S = (0.2, 5.0)
"""Shortest and longest time between two faults."""


def strike(run: FaultRun, chance: random.Random) -> str:
    """One fault, of a kind that is possible now; tells which."""
    here = [node for node in NODES if node not in run.cluster.away]
    kinds = ["worker", "hang", "agent", "controller"]
    kinds += ["lose"] * 2 if len(here) > 1 else []
    kinds += ["return"] * 2 if run.cluster.away else []
    kind = chance.choice(kinds)
    status = run.status()
    training = [node.node for node in status.nodes if node.pids] if status else []
    if kind == "controller":
        run.kill_controller()
        return kind
    if kind == "return":
        node = chance.choice(sorted(run.cluster.away))
        run.bring_back(node)
        return f"{kind} {node}"
    if kind in {"worker", "hang"}:
        if status is None or not training:
            return "nothing: no worker is alive"
        node = chance.choice(training)
        pids = next(one.pids for one in status.nodes if one.node == node)
        number = signal.SIGKILL if kind == "worker" else signal.SIGSTOP
        return f"{kind} {node} {run.cluster.signal_worker(node, pids, number)}"
    node = chance.choice(here)
    (run.lose if kind == "lose" else run.kill_agent)(node)
    return f"{kind} {node}"


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_random_faults(submit: Submit, undisturbed: Undisturbed) -> None:
    seed = int(os.environ.get("REGROW_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    chance = random.Random(seed)
    print(f"REGROW_CHAOS_SEED={seed}")
    undisturbed(OPTIONS)
    run = submit(OPTIONS)
    run.wait_for_step(5)
    began = time.monotonic()
    for _ in range(FAULTS):
        due_s = time.monotonic() + chance.uniform(*PAUSE_S)
        status = run.wait_for(lambda status, due_s=due_s: time.monotonic() > due_s or status.phase.ended, "its time")
        if status.phase.ended:
            break
        print(f"{time.monotonic() - began:6.1f} s, step {status.step}, {status.phase}: {strike(run, chance)}")
    for node in sorted(run.cluster.away):
        run.bring_back(node)
    status = recovered(run, undisturbed, OPTIONS)
    for incident in status.incidents:
        print(f"{incident.cause}: {incident.from_nodes} -> {incident.to_nodes} nodes, {incident.recovery_s:.1f} s")
