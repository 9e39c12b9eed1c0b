"""One cluster of four warm nodes for all fault tests: each submits a job of its own to it and breaks what it likes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import jobfile, ledger
from orchestrator.core.status import Health, JobStatus, Phase
from orchestrator.frontends.cluster import Cluster, ledger_of
from tests.integration.local.harness import JobOptions, LocalRun

NODES = tuple(f"node-{number}" for number in range(4))


class FaultRun(LocalRun):
    """A job on the shared cluster. Every status that is seen is held to the promise that no committed step is lost."""

    committed = -1
    promised = True
    """False once the test itself has damaged a committed checkpoint."""

    def status(self) -> JobStatus | None:
        status = super().status()
        if status is not None:
            step = -1 if status.committed_step is None else status.committed_step
            assert step >= self.committed or not self.promised, f"committed step {self.committed} was lost: now {step}"
            self.committed = step
        return status

    def healthy(self) -> JobStatus:
        """Wait until every node is there."""
        return self.wait_for(
            lambda status: (
                len(status.nodes) == len(NODES) and all(node.verdict.health is Health.HEALTHY for node in status.nodes)
            ),
            "all nodes healthy",
        )

    def post(self, order: str) -> int:
        """Give an order about the job; returns the HTTP status."""
        return self._http.post(f"/v1/jobs/{self.spec.name}/{order}").status_code

    def clean_up(self) -> None:
        """Leave the cluster whole and idle for the next test."""
        self.promised = False
        for node in list(self.cluster.away):
            self.cluster.bring_back(node)
        if not self.wait_for(lambda status: True, "an answer").phase.ended:
            assert self.post("stop") == 202
            self.finish()
        self.healthy()  # a node that is still on its way back would miss the next test's first generation
        self._http.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Path]]:
    directory = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(dict.fromkeys(NODES, 1), directory, lambda notice: None)
    cluster.start()
    yield cluster, directory
    cluster.stop()


Submit = Callable[[JobOptions], FaultRun]


@pytest.fixture
def submit(shared: tuple[Cluster, Path], tmp_path: Path) -> Iterator[Submit]:
    """Start a job on the shared cluster; it is ended with the test."""
    cluster, directory = shared
    runs: list[FaultRun] = []

    def begin(options: JobOptions) -> FaultRun:
        run = FaultRun(cluster, jobfile.parse(options.text(tmp_path), tmp_path), directory)
        shutil.rmtree(ledger_of(directory), ignore_errors=True)
        run.submit()
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.clean_up()


Undisturbed = Callable[[JobOptions], dict[int, ledger.Record]]


@pytest.fixture(scope="session")
def undisturbed(shared: tuple[Cluster, Path], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What one rank computes when nothing happens to it, which every mesh and every recovery must reproduce."""
    cluster, directory = shared
    known: dict[JobOptions, dict[int, ledger.Record]] = {}

    def losses(options: JobOptions) -> dict[int, ledger.Record]:
        key = replace(options, min_nodes=1, max_nodes=1, parallelism="{}", interval="1000 steps", hang_after="60s")
        if key not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            run = FaultRun(cluster, jobfile.parse(key.text(folder), folder), directory)
            shutil.rmtree(ledger_of(directory), ignore_errors=True)
            run.submit()
            assert run.finish().phase is Phase.SUCCEEDED
            known[key] = run.losses()
            run.clean_up()
        return known[key]

    return losses
