"""What passes between workers and controller through the agent: progress, saves, pauses."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.core.types import Directive, LaunchReport, LaunchState
from tests.integration.agents.conftest import SCRIPTS, Cluster
from tests.integration.agents.scripted import make_order


def test_save_is_reported_until_it_is_committed(cluster: Cluster) -> None:
    order = cluster.start({"node-0": 2}, "steps.py")
    number = order.generation.number
    cluster.controller.training("node-0", number, 2)
    directive = Directive(number, order, save_request=1, heartbeat_s=0.5)
    cluster.controller.direct("node-0", directive)
    launch = cluster.controller.wait("save", lambda: launched(cluster, number, "saves"))
    (save,) = launch.saves
    assert (save.generation, save.rank) == (number, 0)
    cluster.controller.direct("node-0", replace(directive, committed_step=save.step))
    cluster.controller.wait("forgotten save", lambda: not cluster.controller.launch("node-0", number).saves)
    assert cluster.log("node-0", number, 0).count('"request"') == 1, "the same request must not be passed on twice"


def test_saves_by_time_are_asked_of_rank_zero_only(cluster: Cluster) -> None:
    number = next(cluster.numbers)
    order = replace(make_order(number, {"node-0": 1, "node-1": 1}, SCRIPTS / "steps.py"), save_every_s=0.2)
    cluster.controller.order(order)
    cluster.controller.wait("two saves", lambda: len(cluster.controller.launch("node-0", number).saves) >= 2)
    requests = [line for line in cluster.log("node-0", number, 0).splitlines() if line.startswith("request")]
    assert '"request": 1' in requests[0]
    assert '"request": 2' in requests[1]
    assert "request" not in cluster.log("node-1", number, 1)


def test_pause_ends_as_paused(cluster: Cluster) -> None:
    order = cluster.start({"node-0": 1}, "steps.py")
    number = order.generation.number
    cluster.controller.training("node-0", number, 1)
    cluster.controller.direct("node-0", Directive(number, order, pause=True, heartbeat_s=0.5))
    launch = cluster.controller.ended("node-0", number)
    assert launch.state is LaunchState.PAUSED
    assert launch.paused_step == launch.saves[0].step == launch.workers[0].step


def test_progress_is_coalesced(cluster: Cluster) -> None:
    number = cluster.start({"node-0": 2}, "steps.py").generation.number
    cluster.controller.training("node-0", number, 2)
    controller = cluster.controller
    seen = len(controller.reports["node-0"])
    first = controller.launch("node-0", number).workers[0].step
    controller.wait("a hundred steps", lambda: controller.launch("node-0", number).workers[0].step > first + 100)
    steps = controller.launch("node-0", number).workers[0].step - first
    assert len(controller.reports["node-0"]) - seen <= steps / 10, "a hundred steps a second are five reports"
    assert controller.launch("node-0", number).workers[0].loss is not None
    assert controller.launch("node-0", number).workers[1].loss is None


def launched(cluster: Cluster, number: int, field: str) -> LaunchReport | None:
    launch = cluster.controller.launch("node-0", number)
    return launch if launch is not None and getattr(launch, field) else None
