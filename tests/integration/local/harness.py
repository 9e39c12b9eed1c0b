"""A whole cluster of real processes that a test can watch over HTTP and break by hand.

    run = LocalRun(Cluster({"node-0": 1, "node-1": 1}, folder, print), spec, folder)
    run.begin()
    run.wait_for_step(12)
    run.kill_worker("node-1")
    assert run.finish().phase is Phase.SUCCEEDED
    run.end()

The processes are those of `regrow run`: `orchestrator.frontends.cluster` starts them, and starts again what crashes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil

from orchestrator import jobfile, ledger, wire
from orchestrator.core.spec import JobSpec
from orchestrator.core.status import JobStatus, Phase
from orchestrator.frontends.children import descendants
from orchestrator.frontends.cluster import Cluster, ledger_of

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "deploy" / "examples" / "gpt" / "train.py"
DEADLINE_S = 120.0
"""For anything that takes seconds on an idle machine."""
SMALL = (
    "--layers",
    "2",
    "--hidden",
    "32",
    "--heads",
    "2",
    "--kv-heads",
    "2",
    "--ffn-hidden",
    "64",
    "--seq-length",
    "32",
)
"""A model whose steps take milliseconds."""

JOB = """
apiVersion: regrow.dev/v1alpha1
kind: TrainingJob
metadata: {{name: {name}}}
spec:
  entrypoint: {{script: "{script}", args: {args}}}
  nodes: {{min: {min_nodes}, max: {max_nodes}, devices: auto}}
  batch: {{global: {batch}}}
  parallelism: {parallelism}
  checkpoint: {{uri: "{checkpoints}", interval: {interval}}}
  recovery: {{heartbeat: 200ms, lostAfter: 5s, hangAfter: {hang_after}, settle: 300ms}}
"""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What tests vary about the job; the default is the example with a tiny model."""

    steps: int = 60
    script: Path = EXAMPLE
    args: tuple[str, ...] | None = None
    """None = `--steps` and a tiny model."""
    min_nodes: int = 1
    max_nodes: int = 4
    batch: int = 12
    parallelism: str = "{}"
    interval: str = "5 steps"
    hang_after: str = "5s"
    name: str = "it"

    def text(self, folder: Path) -> str:
        """The job file, with its checkpoints in `folder`."""
        args = ("--steps", str(self.steps), *SMALL) if self.args is None else self.args
        return JOB.format(
            name=self.name,
            script=self.script,
            args=list(args),
            min_nodes=self.min_nodes,
            max_nodes=self.max_nodes,
            batch=self.batch,
            parallelism=self.parallelism,
            checkpoints=folder / "checkpoints",
            interval=self.interval,
            hang_after=self.hang_after,
        )


@dataclass
class LocalRun:
    """One running cluster with its job."""

    cluster: Cluster
    spec: JobSpec
    directory: Path
    notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.cluster.token}"}
        self._http = httpx2.Client(base_url=self.cluster.url, headers=headers, timeout=20)

    def begin(self) -> None:
        """Start the processes and submit the job."""
        self.cluster.start()
        self.submit()

    def submit(self) -> None:
        """Submit the job once the controller answers."""
        self._until(self._healthy, DEADLINE_S, "the controller answers")
        response = self._http.post("/v1/jobs", content=jobfile.dump(self.spec))
        assert response.status_code == 201, response.text

    def end(self) -> None:
        """Stop everything."""
        self._http.close()
        self.cluster.stop()

    # ---------------------------------------------------------------- watching

    def status(self) -> JobStatus | None:
        """The job now; None while the controller is away.

        Its listener outlives it, so a request to a dead controller waits: not for long, as we are to start it again.
        """
        try:
            response = self._http.get(f"/v1/jobs/{self.spec.name}", timeout=1.0)
        except httpx2.TransportError:
            return None
        assert response.status_code == 200, response.text
        status: JobStatus = wire.loads(response.content, JobStatus)
        return status

    def wait_for(
        self, condition: Callable[[JobStatus], object], what: str, deadline_s: float = DEADLINE_S
    ) -> JobStatus:
        """The first status for which the condition holds; fails after the deadline, telling where the job stands.

        Crashed agents and controllers are started again meanwhile.
        """
        found: list[JobStatus] = []

        def look() -> bool:
            status = self.status()
            if status is not None and condition(status):
                found.append(status)
            return bool(found)

        self._until(look, deadline_s, what)
        return found[-1]

    def wait_for_step(self, step: int, deadline_s: float = DEADLINE_S) -> JobStatus:
        """Until so many steps are complete."""
        return self.wait_for(lambda status: status.step >= step or status.phase.ended, f"step {step}", deadline_s)

    def wait_for_phase(self, phase: Phase, *, after_generation: int = 0, deadline_s: float = DEADLINE_S) -> JobStatus:
        """Until the job is in the phase, in a generation above `after_generation`."""

        def reached(status: JobStatus) -> bool:
            return status.phase is phase and status.generation > after_generation

        return self.wait_for(reached, f"{phase} after generation {after_generation}", deadline_s)

    def wait_for_recovery(self, incidents: int, deadline_s: float = DEADLINE_S) -> JobStatus:
        """Until so many incidents are over and none is open."""

        def over(status: JobStatus) -> bool:
            closed = [one.closed_s is not None for one in status.incidents]
            return len(closed) >= incidents and all(closed)

        return self.wait_for(over, f"the end of {incidents} incidents", deadline_s)

    def finish(self, deadline_s: float = 2 * DEADLINE_S) -> JobStatus:
        """Until the job has ended."""
        return self.wait_for(lambda status: status.phase.ended, "the end of the job", deadline_s)

    def workers(self) -> dict[str, tuple[int, ...]]:
        """Process ids of the workers by node."""
        status = self.wait_for(lambda status: True, "an answer")
        return {node.node: node.pids for node in status.nodes if node.pids}

    # ---------------------------------------------------------------- breaking

    def kill_worker(self, node: str) -> int:
        """SIGKILL of one worker; returns its process id."""
        return self._signal_worker(node, signal.SIGKILL)

    def stop_worker(self, node: str) -> int:
        """SIGSTOP of one worker: a hang; returns its process id."""
        return self._signal_worker(node, signal.SIGSTOP)

    def kill_agent(self, node: str) -> None:
        """SIGKILL of the agent alone; it is started again while a `wait_for` waits."""
        self.cluster.crash(node)

    def kill_controller(self) -> None:
        """SIGKILL of the controller; it is started again while a `wait_for` waits."""
        self.cluster.crash(None)

    def lose(self, *nodes: str) -> None:
        """The nodes lose power at once."""
        for node in nodes:
            self.cluster.agents[node].send(signal.SIGKILL)
        for node in nodes:
            self.cluster.lose(node)

    def bring_back(self, *nodes: str) -> None:
        """Lost nodes start again."""
        for node in nodes:
            self.cluster.bring_back(node)

    def _signal_worker(self, node: str, number: signal.Signals) -> int:
        status = self.wait_for(lambda status: self._pids(status, node), f"a worker on {node}")
        pid = self.cluster.signal_worker(node, self._pids(status, node), number)
        assert pid is not None, f"no worker of {node} is alive"
        return pid

    @staticmethod
    def _pids(status: JobStatus, node: str) -> tuple[int, ...]:
        return next((one.pids for one in status.nodes if one.node == node), ())

    # ---------------------------------------------------------------- judging

    def losses(self) -> dict[int, ledger.Record]:
        """What each step consumed and lost, as it counts."""
        return ledger.effective(ledger_of(self.directory))

    def logs(self) -> str:
        """The end of every log, for a failing test."""
        parts = []
        for path in sorted((self.directory / "logs").glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-25:]
            parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(parts)

    def _healthy(self) -> bool:
        try:
            return self._http.get("/healthz").status_code == 200
        except httpx2.TransportError:
            return False

    def _until(self, condition: Callable[[], bool], deadline_s: float, what: str) -> None:
        end_s = time.monotonic() + deadline_s
        while not condition():
            self.cluster.poll()
            if time.monotonic() > end_s:
                status = self.status()
                where = "no answer" if status is None else f"{status.phase} ({status.reason}) at step {status.step}"
                raise AssertionError(f"waited {deadline_s:.0f} s for {what}; the job: {where}\n{self.logs()}")
            time.sleep(0.02)


def difference(run: LocalRun, undisturbed: dict[int, ledger.Record]) -> ledger.Comparison:
    """How the run differs from the undisturbed one; fails when they do not have the same steps, all with a loss."""
    ours = run.losses()
    assert ours.keys() == undisturbed.keys()
    assert all(record.loss is not None for one in (ours, undisturbed) for record in one.values())
    return ledger.compare(ours, undisturbed)


def regrow(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The command itself, with its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ) | (environment or {}),
    )


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every process below the command now."""
    return descendants(process.pid)
