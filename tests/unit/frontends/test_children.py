"""Real processes: nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestrator.frontends.children import Child, descendants

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
FAMILY = [sys.executable, "-c", "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)", *SLEEP]


def until(condition: Callable[[], object], deadline_s: float = 20.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def child(tmp_path: Path, command: list[str]) -> Child:
    return Child("it", command, os.environ, tmp_path / "log")


def test_it_is_started_again_and_logs_go_on(tmp_path: Path) -> None:
    it = child(tmp_path, [sys.executable, "-c", "import sys; print('hello'); sys.exit(3)"])
    assert (it.alive, it.exit_code, it.pid, it.last_words()) == (False, None, None, "its log is empty")
    for count in (1, 2):
        it.start()
        until(lambda: not it.alive)
        assert it.exit_code == 3
        assert (tmp_path / "log").read_text() == "hello\n" * count
    assert it.last_words() == "hello"


def test_kill_ends_everything_below(tmp_path: Path) -> None:
    it = child(tmp_path, FAMILY)
    it.start()
    until(it.descendants)
    (below,) = it.descendants()
    it.kill()
    assert it.exit_code == -signal.SIGKILL
    until(lambda: gone(below.pid))


PARENT = """
import os, sys, time
from pathlib import Path
from orchestrator.frontends.children import Child
it = Child("it", sys.argv[2:], os.environ, Path(sys.argv[1]))
it.start()
print(it.pid, flush=True)
time.sleep(600)
"""


def test_a_child_dies_with_its_parent_even_under_sigkill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log"), *SLEEP]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    until(lambda: gone(pid))


SWEEPER = """
import os, sys, time
from pathlib import Path
from orchestrator.frontends.children import Child, adopt_orphans, descendants, reap, sweep
adopt_orphans()
it = Child("it", sys.argv[2:], os.environ, Path(sys.argv[1]))
it.start()
while not it.descendants():
    time.sleep(0.01)
orphan = it.descendants()[0].pid
os.kill(it.pid, 9)
while it.alive:
    time.sleep(0.01)
assert [one.pid for one in descendants(os.getpid())] == [orphan], "the orphan was not adopted"
assert sweep() == []
assert descendants(os.getpid()) == []
print(orphan)
"""


def test_an_orphan_is_adopted_and_swept_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SWEEPER, str(tmp_path / "log"), *FAMILY]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert gone(int(done.stdout))


def test_no_process_has_no_descendants() -> None:
    assert descendants(2**22 + 1) == []


def test_signals_to_the_dead_are_lost(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    it = child(tmp_path, [sys.executable, "-c", ""])
    it.send(signal.SIGTERM)
    it.start()
    until(lambda: not it.alive)
    it.send(signal.SIGTERM)
    it.kill()
    assert capfd.readouterr() == ("", "")
