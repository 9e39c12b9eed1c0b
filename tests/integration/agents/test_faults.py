"""SIGKILL and SIGSTOP at every level of the process tree: agent, warm process, elastic process, worker."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from orchestrator.core.types import Directive, LaunchState, WorkerReport, WorkerState
from tests.integration.agents.conftest import SCRIPTS, Cluster, agent
from tests.integration.agents.scripted import ScriptedController, make_order, wait_until


@dataclass
class Tree:
    """The processes of one node, top down."""

    agent: psutil.Process
    warm: psutil.Process
    elastic: psutil.Process
    workers: list[psutil.Process]
    child: psutil.Process
    """Forked by the script of rank 0."""
    away: psutil.Process
    """Started by it in a session of its own."""

    def gone(self, *names: str) -> bool:
        below = {"elastic": [self.elastic], "workers": self.workers, "child": [self.child], "away": [self.away]}
        below |= {"agent": [self.agent], "warm": [self.warm]}
        return not any(process.is_running() for name in names for process in below[name])


def grow_tree(cluster: Cluster, *args: str) -> tuple[int, Tree]:
    """Launch two workers with children."""
    number = cluster.start({"node-0": 2}, "steps.py", "fork", *args).generation.number
    workers = [psutil.Process(pid) for pid in cluster.controller.training("node-0", number, 2)]
    elastic = workers[0].parent()
    assert elastic is not None
    warm = elastic.parent()
    assert warm is not None
    top = psutil.Process(cluster.agents["node-0"].pid)
    assert warm.parent() == top
    return number, Tree(top, warm, elastic, workers, *cluster.child("node-0", number, 0))


def worker(cluster: Cluster, number: int, rank: int) -> WorkerReport | None:
    launch = cluster.controller.launch("node-0", number)
    return next((w for w in launch.workers if w.rank == rank), None) if launch is not None else None


def test_stopped_worker_is_seen_and_dies_with_its_group(cluster: Cluster) -> None:
    number, tree = grow_tree(cluster)
    tree.workers[1].suspend()
    held = cluster.controller.wait(
        "STOPPED worker", lambda: (w := worker(cluster, number, 1)) and w.state is WorkerState.STOPPED and w, 5.0
    )
    assert held.exit_code is None
    idle = cluster.controller.wait(
        "idle worker", lambda: (w := worker(cluster, number, 1)) and w.idle_s > 1.0 and w, 5.0
    )
    assert idle.ping_age_s > 1.0
    tree.workers[1].resume()
    cluster.controller.wait("running worker", lambda: worker(cluster, number, 1).state is WorkerState.RUNNING, 5.0)
    tree.workers[1].suspend()
    tree.workers[0].kill()
    launch = cluster.controller.ended("node-0", number, 5.0)
    assert [e.rank for e in launch.errors] == [0]
    assert tree.gone("elastic", "workers", "child", "away")


def test_killed_elastic_process(cluster: Cluster) -> None:
    number, tree = grow_tree(cluster)
    tree.workers[1].suspend()
    tree.elastic.kill()
    launch = cluster.controller.ended("node-0", number, 5.0)
    assert (launch.state, [w.exit_code for w in launch.workers]) == (LaunchState.FAILED, [-9, -9])
    assert [e.exception for e in launch.errors] == ["signal SIGKILL"]
    assert "elastic process" in launch.errors[0].message
    assert tree.gone("elastic", "workers", "child", "away")
    assert tree.warm.is_running()


def test_killed_warm_process_is_replaced(cluster: Cluster) -> None:
    number, tree = grow_tree(cluster)
    tree.workers[1].suspend()
    tree.warm.kill()
    launch = cluster.controller.ended("node-0", number, 5.0)
    assert (launch.state, [w.exit_code for w in launch.workers]) == (LaunchState.FAILED, [-9, -9])
    assert "warm process" in launch.errors[0].message
    assert tree.gone("warm", "elastic", "workers", "child", "away")
    assert cluster.controller.report("node-0").warm is False
    again = cluster.start({"node-0": 1}, "reduce.py").generation.number  # waits for the new warm process
    assert cluster.controller.ended("node-0", again).state is LaunchState.SUCCEEDED


def test_stop_of_a_hung_elastic_and_warm_process(cluster: Cluster) -> None:
    _, tree = grow_tree(cluster)
    tree.warm.suspend()
    tree.elastic.suspend()
    cluster.stop()
    assert tree.gone("warm", "elastic", "workers", "child", "away")


@pytest.fixture
def lonely(tmp_path: Path) -> Iterator[Cluster]:
    """An agent of its own, for a test that ends it; not waited for until warm."""
    cluster = Cluster(ScriptedController(), tmp_path)
    with agent(cluster.controller, "node-0", tmp_path / "node-0", "--devices", "2") as process:
        cluster.agents = {"node-0": process}
        yield cluster
    cluster.controller.close()


@pytest.mark.parametrize("stopped_worker", [False, True])
def test_killed_agent_takes_everything_with_it(lonely: Cluster, stopped_worker: bool) -> None:
    """Nobody but the kernel can end them: the warm process is stopped, the workers are deaf to all else."""
    number, tree = grow_tree(lonely, "deaf")
    away = [tree.away, lonely.child("node-0", number, 1)[1]]
    tree.warm.suspend()
    if stopped_worker:
        tree.workers[1].suspend()
    lonely.agents["node-0"].kill()
    lonely.agents["node-0"].wait()
    try:
        wait_until(lambda: tree.gone("warm", "elastic", "workers", "child"), 5.0)
    finally:
        for process in away:
            process.kill()  # in sessions of their own: only the agent could have known them


def test_terminated_agent_stops_its_workers_and_succeeds(lonely: Cluster) -> None:
    number, tree = grow_tree(lonely)
    lonely.agents["node-0"].send_signal(signal.SIGTERM)
    assert lonely.agents["node-0"].wait(10.0) == 0
    assert tree.gone("warm", "elastic", "workers", "child", "away")
    assert lonely.controller.ended("node-0", number, 10.0).state is LaunchState.STOPPED


def test_lost_controller_does_not_stop_training(cluster: Cluster) -> None:
    number = cluster.start({"node-0": 2}, "steps.py").generation.number
    pids = cluster.controller.training("node-0", number, 2)
    before = cluster.controller.report("node-0")
    step = before.launch.workers[0].step
    old = cluster.controller
    old.close()
    time.sleep(1.0)  # a controller that is away for a while
    cluster.controller = ScriptedController(old.port)
    after = cluster.controller.wait("report to the new controller", lambda: cluster.controller.report("node-0"))
    assert after.instance == before.instance
    assert [w.pid for w in after.launch.workers] == pids
    assert after.launch.workers[0].step > step + 10, "training must have gone on meanwhile"


def test_order_for_a_node_that_is_still_warming_up_can_be_withdrawn(lonely: Cluster) -> None:
    lonely.controller.wait("first report", lambda: lonely.controller.report("node-0"))
    assert lonely.controller.report("node-0").warm is False
    lonely.controller.order(make_order(1, {"node-0": 1}, SCRIPTS / "steps.py"))
    lonely.controller.wait("launch", lambda: lonely.controller.launch("node-0", 1))
    lonely.controller.direct("node-0", Directive(2, heartbeat_s=0.5))
    assert lonely.controller.ended("node-0", 1, 2.0).state is LaunchState.STOPPED


def test_warm_process_has_one_thread(cluster: Cluster) -> None:
    """Forks of a process with more threads may copy locks that nobody ever releases."""
    _, tree = grow_tree(cluster)
    assert tree.warm.num_threads() == 1
