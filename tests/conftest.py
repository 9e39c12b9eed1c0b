"""What holds for every test: no process outlives it, and any test can be run many times in a row with `--count`."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

# These machines are slow and noisy: how long one example takes says nothing. A change is held to the same examples each
# time; REGROW_RANDOM=1 looks for new ones.
settings.register_profile("regrow", deadline=None, derandomize="REGROW_RANDOM" not in os.environ)
settings.load_profile("regrow")

MARK = "REGROW_TEST_MARK"
"""Environment variable that every process started inside a test inherits."""
GRACE_S = 10.0
"""How long processes may take to go after a test has ended."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--count", type=int, default=1, help="run every test this many times in a row")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    count = metafunc.config.getoption("--count")
    if count > 1:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(1, count + 1), indirect=True, ids=lambda n: f"run{n}")


@pytest.fixture(autouse=True)
def log_as_at_first() -> Iterator[None]:
    """A test that sets up logging leaves it as it was: what it wrote to is closed afterwards."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def repetition(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


def marked(mark: str) -> dict[int, str]:
    """Living processes that carry the mark -> their command lines."""
    found = {}
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            if (entry / "stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}:
                continue
            found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended while we looked
    return found


@pytest.fixture(autouse=True)
def no_process_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test that leaks a process, and kills what it leaked."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield
    deadline = time.monotonic() + GRACE_S
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes left behind: {left}"
