from __future__ import annotations

import subprocess
import sys

import pytest

from agents import processes
from agents.probes.workers import STUCK_LOOKS, HeldProbe

TREE = """
import os, subprocess, sys
from agents.processes import adopt_orphans, descendants, sweep
adopt_orphans()
leave_orphan = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"
subprocess.Popen([sys.executable, "-c", leave_orphan]).wait()
stopped = subprocess.Popen(["sleep", "600"])
os.kill(stopped.pid, 19)
assert len(descendants(os.getpid())) == 2, descendants(os.getpid())
reaped = {}
assert sweep(reaped.__setitem__, block=True)
assert reaped[stopped.pid] == -9 and set(reaped.values()) == {-9}, reaped
assert descendants(os.getpid()) == []
assert sweep()
"""


@pytest.mark.parametrize("listed", [True, False])
def test_sweep_kills_orphans_and_stopped_processes(listed: bool) -> None:
    head = "" if listed else "import agents.processes; agents.processes.KERNEL_LISTS_CHILDREN = False\n"
    subprocess.run([sys.executable, "-c", head + TREE], check=True, timeout=60)


def test_process_whose_parent_is_gone_dies_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from agents.processes import die_with_parent; die_with_parent(1); print('alive')"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-9, b"")


def test_group_that_does_not_exist() -> None:
    child = subprocess.Popen(["true"], start_new_session=True)
    child.wait()
    assert not processes.kill_group(child.pid)


@pytest.mark.parametrize(("code", "name"), [(0, "exit 0"), (3, "exit 3"), (-9, "signal SIGKILL"), (-200, "signal 200")])
def test_signal_names(code: int, name: str) -> None:
    assert processes.signal_name(code) == name


def test_one_look_at_a_process_in_disk_sleep_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    status = "disk-sleep"
    monkeypatch.setattr("psutil.Process.status", lambda _: status)
    monkeypatch.setattr("psutil.Process.__init__", lambda *_: None)
    probe = HeldProbe()
    assert [probe.look(1) for _ in range(STUCK_LOOKS)] == [False] * (STUCK_LOOKS - 1) + [True]
    status = "sleeping"
    assert not probe.look(1)
    status = "stopped"
    assert probe.look(1)


def test_process_that_is_gone_is_not_held() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert not HeldProbe().look(child.pid)
