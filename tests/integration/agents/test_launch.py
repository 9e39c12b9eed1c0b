"""One generation after the other on real agents: worlds, endings, errors."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestrator.core.types import LaunchState, WorkerState
from tests.integration.agents.conftest import SCRIPTS, Cluster
from tests.integration.agents.scripted import make_order


@pytest.mark.parametrize(
    "nodes", [{"node-0": 1}, {"node-0": 2}, {"node-0": 1, "node-1": 1}, {"node-1": 2, "node-0": 1}]
)
def test_workers_of_all_nodes_form_one_world(cluster: Cluster, nodes: dict[str, int]) -> None:
    order = cluster.start(nodes, "reduce.py", "--shards={dp_shard}", environment={"EXTRA": "yes"})
    number, world = order.generation.number, sum(nodes.values())
    for node in nodes:
        launch = cluster.controller.ended(node, number)
        assert (launch.state, launch.errors) == (LaunchState.SUCCEEDED, ())
        assert all(w.exit_code == 0 and w.state is WorkerState.EXITED for w in launch.workers)
    randoms = set()
    for part in order.generation.assignment:
        for local in range(part.devices):
            rank = part.first_rank + local
            said = json.loads(cluster.log(part.node, number, rank))
            assert said["sum"] == world * (world + 1) / 2
            assert (said["RANK"], said["LOCAL_RANK"], said["WORLD_SIZE"]) == (str(rank), str(local), str(world))
            assert said["argv"] == [f"--shards={world}"]
            assert (said["main"], said["path"], said["cwd"]) == ("__main__", str(SCRIPTS), str(SCRIPTS))
            assert (said["mesh"]["dp_shard"], said["extra"], said["OMP_NUM_THREADS"]) == (world, "yes", "1")
            assert said["REGROW_GENERATION"] == str(number)
            assert said["token"] is None, "a training script has no business with the controller"
            randoms.add(said["random"])
    assert len(randoms) == world, "workers must not share their random state"


def test_ten_generations_in_a_row(cluster: Cluster) -> None:
    stores = set()
    for _ in range(10):
        number = cluster.start({"node-0": 1, "node-1": 1}, "reduce.py").generation.number
        launches = [cluster.controller.ended(node, number, 30.0) for node in cluster.nodes]
        assert [launch.state for launch in launches] == [LaunchState.SUCCEEDED] * 2
        stores.add(launches[0].store)
    assert len(stores) > 5, "every generation needs a store of its own (the kernel may give a freed port again)"


def test_killed_worker_fails_the_launch_within_a_second(cluster: Cluster) -> None:
    number = cluster.start({"node-0": 2}, "steps.py").generation.number
    victim, other = cluster.controller.training("node-0", number, 2)
    psutil.Process(victim).kill()
    launch = cluster.controller.ended("node-0", number, deadline_s=1.0)
    assert launch.state is LaunchState.FAILED
    assert [w.exit_code for w in launch.workers] == [-9, -9]
    assert [(e.rank, e.exception, e.collective) for e in launch.errors] == [(0, "signal SIGKILL", False)]
    assert launch.errors[0].step > 5
    assert not psutil.pid_exists(other)


def test_exception_is_the_root_cause_and_the_lost_collective_is_not(cluster: Cluster) -> None:
    number = cluster.start({"node-0": 1, "node-1": 1}, "endings.py", "raise").generation.number
    launch = cluster.controller.ended("node-0", number)
    (error,) = launch.errors
    assert launch.state is LaunchState.FAILED
    assert (error.exception, error.message, error.collective) == ("ValueError", "the loss is not a number", False)
    assert error.traceback.startswith('Traceback (most recent call last):\n  File "' + str(SCRIPTS / "endings.py"))
    assert error.traceback in cluster.log("node-0", number, 0)
    (peer,) = cluster.controller.ended("node-1", number).errors
    assert peer.collective
    assert error.time_s < peer.time_s


def test_collective_that_fails_while_cleaning_up_does_not_hide_the_exception(cluster: Cluster) -> None:
    number = cluster.start({"node-0": 2}, "endings.py", "cleanup").generation.number
    errors = {error.rank: error for error in cluster.controller.ended("node-0", number).errors}
    assert not errors[0].collective
    assert "KeyError: 'weights'" in errors[0].traceback


def test_echo_waits_for_the_root_cause_beside_it(cluster: Cluster) -> None:
    number = cluster.start({"node-0": 2}, "endings.py", "late").generation.number
    errors = {error.rank: error for error in cluster.controller.ended("node-0", number).errors}
    assert (errors[1].collective, errors[0].collective, errors[0].message) == (True, False, "the reason")


@pytest.mark.parametrize(
    ("args", "exit_code", "exception", "tail"),
    [
        (("exit", "3"), 3, "exit 3", ""),
        (("message",), 1, "exit 1", "out of data"),
        (("abort",), -6, "signal SIGABRT", ""),
    ],
)
def test_exit_codes(cluster: Cluster, args: tuple[str, ...], exit_code: int, exception: str, tail: str) -> None:
    number = cluster.start({"node-0": 1}, "endings.py", *args).generation.number
    launch = cluster.controller.ended("node-0", number)
    assert launch.workers[0].exit_code == exit_code
    assert launch.errors[0].exception == exception
    assert tail in launch.errors[0].traceback


def test_script_may_have_children_threads_and_exit_handlers(cluster: Cluster) -> None:
    order = make_order(next(cluster.numbers), {"node-0": 1}, SCRIPTS / "children.py")
    entrypoint = replace(order.entrypoint, script="scripts/children.py", working_directory=str(SCRIPTS.parent))
    cluster.controller.order(replace(order, entrypoint=entrypoint))
    launch = cluster.controller.ended("node-0", order.generation.number)
    assert (launch.state, launch.errors) == (LaunchState.SUCCEEDED, ())
    said = cluster.log("node-0", order.generation.number, 0).splitlines()
    wanted = ["loaded 28.0", "squared 49", "subprocess 6", "matmul 262144.0", "thread done", "exit handler"]
    assert [line for line in said if line in wanted] == wanted


def test_exit_zero_is_success(cluster: Cluster) -> None:
    number = cluster.start({"node-0": 1}, "endings.py", "exit", "0").generation.number
    assert cluster.controller.ended("node-0", number).state is LaunchState.SUCCEEDED


@pytest.mark.parametrize(("text", "exception"), [("def f(:", "SyntaxError"), (None, "FileNotFoundError")])
def test_script_that_cannot_run(cluster: Cluster, tmp_path: Path, text: str | None, exception: str) -> None:
    script = tmp_path / "train.py"
    if text is not None:
        script.write_text(text)
    number = cluster.start({"node-0": 1}, str(script)).generation.number
    launch = cluster.controller.ended("node-0", number)
    assert launch.state is LaunchState.FAILED
    assert launch.errors[0].exception == exception
    assert "train.py" in launch.errors[0].traceback
    assert "runpy" not in launch.errors[0].traceback


def test_stop_leaves_nothing_and_is_quick(cluster: Cluster) -> None:
    number = cluster.start({"node-0": 2}, "steps.py", "fork").generation.number
    pids = cluster.controller.training("node-0", number, 2)
    children = [int(pid) for pid in re.findall(r"children (\d+) (\d+)", cluster.log("node-0", number, 0))[0]]
    started = time.monotonic()
    cluster.stop()
    assert time.monotonic() - started < 5.0  # 0.03 s on a quiet machine
    launch = cluster.controller.launch("node-0", number)
    assert launch is not None
    assert (launch.state, launch.errors) == (LaunchState.STOPPED, ())
    assert not [pid for pid in (*pids, *children) if psutil.pid_exists(pid)]


def test_new_generation_replaces_the_old_one(cluster: Cluster) -> None:
    number = cluster.start({"node-0": 1}, "steps.py").generation.number
    (old,) = cluster.controller.training("node-0", number, 1)
    newer = cluster.start({"node-0": 2}, "steps.py").generation.number
    cluster.controller.training("node-0", newer, 2)
    assert not psutil.pid_exists(old)


def test_older_generation_is_refused(cluster: Cluster) -> None:
    old = next(cluster.numbers)
    number = cluster.start({"node-0": 1}, "steps.py").generation.number
    pids = cluster.controller.training("node-0", number, 1)
    order = make_order(old, {"node-0": 1}, SCRIPTS / "steps.py")
    seen = len(cluster.controller.reports["node-0"])
    cluster.controller.order(order)
    cluster.controller.wait("three more reports", lambda: len(cluster.controller.reports["node-0"]) > seen + 3)
    launch = cluster.controller.launch("node-0", number)
    assert launch is not None
    assert [w.pid for w in launch.workers] == pids
    assert launch.workers[0].exit_code is None


def test_ended_launch_is_not_started_again(cluster: Cluster) -> None:
    order = cluster.start({"node-0": 1}, "endings.py", "exit", "3")
    ended = cluster.controller.ended("node-0", order.generation.number)
    cluster.controller.order(replace(order, store="127.0.0.1:1"))
    seen = len(cluster.controller.reports["node-0"])
    cluster.controller.wait("two more reports", lambda: len(cluster.controller.reports["node-0"]) > seen + 2)
    launch = cluster.controller.launch("node-0", order.generation.number)
    assert launch is not None
    assert (launch.state, launch.workers[0].pid) == (LaunchState.FAILED, ended.workers[0].pid)
