"""Failing for real: real processes are killed and stopped, and training goes on by itself, exactly as if they had not.

Every test ends with the same judgement (`recovered`): the job SUCCEEDED, its losses are those of an undisturbed run, no
sample was lost or repeated, and (on every status seen meanwhile) no committed step was ever lost. Ten in a row:
`make test-faults`.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from orchestrator.core.status import Health, JobStatus, Phase
from tests.integration.faults.conftest import NODES, FaultRun, Submit, Undisturbed
from tests.integration.local.harness import JobOptions, difference

OPTIONS = JobOptions(steps=80, interval="5 steps")
TOLERANCE = 1e-5

pytestmark = [pytest.mark.fault, pytest.mark.timeout(400)]


def recovered(run: FaultRun, undisturbed: Undisturbed, options: JobOptions = OPTIONS) -> JobStatus:
    status = run.finish()
    assert status.phase is Phase.SUCCEEDED, f"{status.reason}\n{run.logs()}"
    found = difference(run, undisturbed(options))
    assert found.max_loss_difference <= TOLERANCE
    assert (found.samples_lost, found.samples_repeated) == (0, 0)
    assert status.committed_step == options.steps
    return status


def test_a_worker_is_killed(submit: Submit, undisturbed: Undisturbed) -> None:
    baseline = undisturbed(OPTIONS)
    assert len(baseline) == OPTIONS.steps
    run = submit(OPTIONS)
    run.wait_for_step(12)
    run.kill_worker("node-1")
    status = recovered(run, undisturbed)
    (incident,) = status.incidents
    assert "SIGKILL" in incident.cause
    assert (incident.from_nodes, incident.to_nodes) == (4, 4), "the same hardware goes on"
    assert incident.lost_steps <= 12


def test_an_agent_is_killed_and_its_workers_with_it(submit: Submit, undisturbed: Undisturbed) -> None:
    run = submit(OPTIONS)
    run.wait_for_step(12)
    (worker,) = run.workers()["node-2"]
    run.kill_agent("node-2")
    run.wait_for(lambda status: status.incidents, "the incident")
    assert not alive(worker), "a worker outlived its agent"
    status = recovered(run, undisturbed)
    assert "node-2 lost" in status.incidents[0].cause


def test_two_nodes_are_lost_at_once(submit: Submit, undisturbed: Undisturbed) -> None:
    run = submit(OPTIONS)
    run.wait_for_step(12)
    run.lose("node-1", "node-3")
    status = recovered(run, undisturbed)
    assert (status.incidents[0].from_nodes, status.incidents[-1].to_nodes) == (4, 2)


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.STOPPING])
def test_a_node_is_lost_during_recovery(submit: Submit, undisturbed: Undisturbed, phase: Phase) -> None:
    run = submit(OPTIONS)
    run.wait_for_step(12)
    run.lose("node-0")  # the one that hosts the store
    run.wait_for(lambda status: status.phase is phase or status.generation > 1, f"{phase} or later")
    run.lose("node-2")
    status = recovered(run, undisturbed)
    assert status.incidents[-1].to_nodes == 2


def test_the_controller_is_killed_during_training(submit: Submit, undisturbed: Undisturbed) -> None:
    options = JobOptions(steps=300, interval="50 steps")  # long enough to be still training under the new controller
    run = submit(options)
    run.wait_for_step(12)
    before = run.workers()
    assert len(before) == len(NODES)
    run.kill_controller()
    run.wait_for(
        lambda status: sum(bool(node.pids) for node in status.nodes) == len(NODES) or status.phase.ended,
        "all workers known to the new controller",
    )
    assert run.workers() == before, "workers were restarted"
    status = recovered(run, undisturbed, options)
    assert status.incidents == ()


def test_the_controller_is_killed_during_recovery(submit: Submit, undisturbed: Undisturbed) -> None:
    run = submit(OPTIONS)
    run.wait_for_step(12)
    run.lose("node-3")
    run.wait_for(lambda status: status.phase is not Phase.RUNNING, "the recovery")
    run.kill_controller()
    status = recovered(run, undisturbed)
    assert status.incidents[-1].to_nodes == 3


def test_a_node_and_the_controller_die_together(submit: Submit, undisturbed: Undisturbed) -> None:
    run = submit(OPTIONS)
    run.wait_for_step(12)
    run.kill_controller()
    run.lose("node-1")
    status = recovered(run, undisturbed)
    assert status.incidents[-1].to_nodes == 3


def test_a_worker_is_stopped(submit: Submit, undisturbed: Undisturbed) -> None:
    """SIGSTOP: alive, connected, and making no progress."""
    run = submit(OPTIONS)
    run.wait_for_step(12)
    run.stop_worker("node-1")
    status = recovered(run, undisturbed)
    assert "hangs" in status.incidents[0].cause
    assert "on node-1" in status.incidents[0].cause


def test_an_agent_is_stopped(submit: Submit, undisturbed: Undisturbed) -> None:
    """SIGSTOP of the agent: its connection stays open, its heartbeats cease. The lease runs out."""
    run = submit(OPTIONS)
    run.wait_for_step(12)
    pid = run.cluster.agents["node-1"].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        # What its workers did meanwhile may have finished the job already; then nothing was lost.
        run.wait_for(lambda status: status.incidents or status.phase.ended, "the loss")
        status = run.finish()
    finally:
        os.kill(pid, signal.SIGCONT)
    recovered(run, undisturbed)
    assert all("node-1 lost: no heartbeat" in one.cause for one in status.incidents[:1])


def test_a_node_is_lost_and_returns(submit: Submit, undisturbed: Undisturbed) -> None:
    options = JobOptions(steps=500, interval="20 steps")
    run = submit(options)
    run.wait_for_step(25)
    run.lose("node-2")
    run.wait_for_recovery(1)
    run.bring_back("node-2")
    run.wait_for(lambda status: len(status.incidents) >= 2 or status.phase.ended, "growth")
    status = recovered(run, undisturbed, options)
    shrink, growth = status.incidents
    assert (shrink.from_nodes, shrink.to_nodes) == (4, 3)
    assert (growth.from_nodes, growth.to_nodes) == (3, 4)
    assert "capacity grew: node-2" in growth.cause
    assert growth.lost_steps == 0, "a planned change loses no step"


def test_a_corrupt_checkpoint_is_passed_over(submit: Submit, undisturbed: Undisturbed) -> None:
    options = JobOptions(steps=300, interval="50 steps")
    baseline = undisturbed(options)
    run = submit(options)
    status = run.wait_for(lambda status: (status.committed_step or 0) >= 100, "two checkpoints")
    damaged = status.committed_step
    run.promised = False
    root = Path(run.spec.checkpoint.uri.removeprefix("file://"))
    (newest,) = root.glob(f"step-{damaged:08}-gen-*")
    for part in newest.glob("part-*.safetensors"):
        data = bytearray(part.read_bytes())
        data[-3] ^= 1
        part.write_bytes(data)
    run.lose("node-3")
    status = recovered(run, undisturbed, options)
    assert len(baseline) == options.steps
    assert status.incidents[0].resumed_step == (damaged or 0) - 50


def test_the_same_error_twice_ends_the_job_with_its_traceback(submit: Submit, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(OPTIONS.script.parent)!r})\n"
        "from orchestrator.trainer import Session\n"
        "step = Session.step\n"
        "def fails(self, loss=None):\n"
        "    step(self, loss)\n"
        "    if self.completed == 8 and self.rank == 1:\n"
        "        raise ValueError('the data is gone')\n"
        "Session.step = fails\n"
        "import train\ntrain.main()\n"
    )
    base = JobOptions(steps=80)
    args = tuple(jobargs(base))
    run = submit(JobOptions(script=script, args=args, interval="5 steps"))
    status = run.finish()
    assert status.phase is Phase.FAILED
    assert status.failure is not None
    assert "same error at the same step twice" in status.failure.reason
    assert "ValueError: the data is gone" in status.failure.traceback
    assert status.failure.rank == 1
    assert status.generation - first_generation(status) == 1, "two generations, no more"


def test_too_few_nodes_wait_with_a_reason(submit: Submit, undisturbed: Undisturbed) -> None:
    options = JobOptions(steps=80, interval="5 steps", min_nodes=4)
    run = submit(options)
    run.wait_for_step(12)
    run.lose("node-2")
    run.wait_for(lambda status: "3 of at least 4 nodes" in status.reason, "the reason")
    run.bring_back("node-2")
    recovered(run, undisturbed, options)


def test_a_save_is_made_when_it_is_ordered(submit: Submit) -> None:
    run = submit(JobOptions(steps=2000, interval="100000 steps"))
    run.wait_for_step(5)
    assert run.post("save") == 202
    status = run.wait_for(lambda status: status.committed_step is not None or status.phase.ended, "the checkpoint")
    assert not status.phase.ended
    assert status.incidents == ()
    run.post("stop")
    status = run.finish()
    assert status.reason.startswith("stopped by order")
    assert status.committed_step is not None
    assert status.committed_step >= status.step - 1, "it saved before it stopped"


def test_a_drained_node_is_left_without_losing_a_step(submit: Submit, undisturbed: Undisturbed) -> None:
    run = submit(OPTIONS)
    run.wait_for_step(12)
    assert run.post("nodes/node-1/drain") == 202
    status = recovered(run, undisturbed)
    (incident,) = status.incidents
    # On a machine so busy that other nodes miss heartbeats meanwhile, the cause tells of these, too.
    assert incident.cause.startswith("node-1 drained by order")
    assert (incident.to_nodes, incident.lost_steps) == (3, 0)


def jobargs(options: JobOptions) -> list[str]:
    """The arguments that the options' job gives to the example."""
    from orchestrator import jobfile

    return list(jobfile.parse(options.text(Path("/")), Path("/")).entrypoint.args)


def first_generation(status: JobStatus) -> int:
    """Number of the job's first generation: the shared cluster counts on from job to job."""
    return status.generation - len(status.incidents) + 1


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def test_the_cluster_is_whole_again(submit: Submit) -> None:
    """After all that, four nodes train together once more."""
    run = submit(JobOptions(steps=3))
    run.finish()
    status = run.healthy()
    assert {node.node for node in status.nodes if node.verdict.health is Health.HEALTHY} == set(NODES)
