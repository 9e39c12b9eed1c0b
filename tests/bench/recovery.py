"""From the SIGKILL of one of two workers to the first new step, against stock torchrun restarting the same script.

Limit: what a relaunch cannot do without is forking the workers, forming the gloo group and one step. The peer pays for
two fresh interpreters that import torch, and runs with `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`, without which torch 2.13
hangs on some restarts. It restores nothing: its workers start again from step 1.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from orchestrator import jobfile
from orchestrator.core.status import STAGES, Phase
from orchestrator.frontends.cluster import Cluster
from tests.integration.local.harness import EXAMPLE, SMALL, JobOptions, LocalRun

ROUNDS = 5
DEADLINE_S = 120.0


def measure(rounds: int = ROUNDS) -> dict[str, Any]:
    """Medians in seconds, and the ratio ours / peer."""
    ours, stages = _ours(rounds)
    peer = _torchrun(rounds)
    return {
        "rounds": rounds,
        "seconds": statistics.median(ours),
        "stages_s": {stage: statistics.median(one.get(stage, 0.0) for one in stages) for stage in STAGES},
        "torchrun_seconds": statistics.median(peer),
        "ratio": statistics.median(ours) / statistics.median(peer),
    }


def _ours(rounds: int) -> tuple[list[float], list[dict[str, float]]]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        options = JobOptions(steps=100_000, max_nodes=2, interval="10 steps")
        cluster = Cluster({"node-0": 1, "node-1": 1}, directory, lambda notice: None)
        run = LocalRun(cluster, jobfile.parse(options.text(directory), directory), directory)
        try:
            run.begin()
            status = run.wait_for_step(20)
            for number in range(1, rounds + 1):
                run.kill_worker("node-1")
                status = run.wait_for_recovery(number)
                status = run.wait_for_step(status.step + 20)
                assert status.phase is Phase.RUNNING
            closed = status.incidents
            return [one.recovery_s for one in closed], [one.stages_s for one in closed]
        finally:
            run.end()


def _torchrun(rounds: int) -> list[float]:
    with tempfile.TemporaryDirectory() as name:
        ledger = Path(name)
        environment = dict(os.environ) | {
            "REGROW_LEDGER": str(ledger),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", str(rounds + 1), str(EXAMPLE), "--steps", "100000", *SMALL]
        launcher = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            _until(lambda: _lines(ledger) > 20)
            return [_restart(launcher, ledger) for _ in range(rounds)]
        finally:
            os.killpg(launcher.pid, signal.SIGTERM)
            launcher.wait()


def _restart(launcher: subprocess.Popen[bytes], ledger: Path) -> float:
    worker = max(psutil.Process(launcher.pid).children(), key=lambda child: child.create_time())
    worker.kill()
    began = time.perf_counter()
    worker.wait()
    before = _lines(ledger)
    time.sleep(0.05)  # the other worker may still be writing the line of the step it was in
    before = max(before, _lines(ledger))
    _until(lambda: _lines(ledger) > before)
    seconds = time.perf_counter() - began
    _until(lambda: _lines(ledger) > before + 20)
    return seconds


def _lines(ledger: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in ledger.glob("*.jsonl"))


def _until(condition: Any) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError("torchrun did not get to its next step")
        time.sleep(0.005)


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
