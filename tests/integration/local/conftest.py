"""Fixtures of the fault tests: `start` a cluster with a job; `undisturbed` losses of the same job, once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from orchestrator import jobfile, ledger
from orchestrator.core.status import Phase
from orchestrator.frontends.cluster import Cluster

from .harness import JobOptions, LocalRun


class Start(Protocol):
    """Starts a cluster of `nodes` nodes with a job; both end with the test."""

    def __call__(self, options: JobOptions | None = None, *, nodes: int = 3, devices: int = 1) -> LocalRun: ...


def launch(directory: Path, options: JobOptions, nodes: int, devices: int) -> LocalRun:
    notices: list[str] = []
    cluster = Cluster({f"node-{number}": devices for number in range(nodes)}, directory, notices.append)
    return LocalRun(cluster, jobfile.parse(options.text(directory), directory), directory, notices)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[LocalRun] = []

    def begin(options: JobOptions | None = None, *, nodes: int = 3, devices: int = 1) -> LocalRun:
        directory = tmp_path / f"run-{len(runs) + 1}"
        directory.mkdir()
        run = launch(directory, options or JobOptions(max_nodes=nodes), nodes, devices)
        runs.append(run)
        run.begin()
        return run

    yield begin
    for run in runs:
        run.end()


Undisturbed = Callable[[JobOptions], dict[int, ledger.Record]]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The ledger of the job on one node that nothing happens to."""
    known: dict[JobOptions, dict[int, ledger.Record]] = {}

    def losses(options: JobOptions) -> dict[int, ledger.Record]:
        # One rank computes what any mesh must: neither its checkpoints nor its number of nodes matter.
        key = replace(options, min_nodes=1, max_nodes=1, parallelism="{}", interval="1000 steps", hang_after="60s")
        if key not in known:
            run = launch(tmp_path_factory.mktemp("undisturbed"), key, 1, 1)
            try:
                run.begin()
                assert run.finish().phase is Phase.SUCCEEDED
                known[key] = run.losses()
            finally:
                run.end()
        return known[key]

    return losses
