"""Killed at any file operation, power cut after any of them: readers see all of a checkpoint or nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.checkpoint import store
from orchestrator.checkpoint.formats import native
from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.verify import verify
from orchestrator.core.errors import CheckpointError
from orchestrator.core.types import SaveReport
from tests.unit.checkpoint.saving import WEIGHT, commit, save, write_all, write_rank

WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "fcntl.flock", "shutil.rmtree", "os.scandir"}
"""Audit events of file operations; each is raised just before the operation."""


def killed_before(point: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that is killed before its file operation number `point`; False when it had fewer."""
    child = os.fork()
    if child == 0:
        count = 0

        def pass_point() -> None:
            nonlocal count
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        try:
            os.fsync = lambda _: pass_point()
            sys.addaudithook(lambda event, _: pass_point() if event in WATCHED else None)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "the work failed by itself"
    return False


@pytest.fixture(autouse=True)
def no_real_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill does not lose what the kernel has; syncs are points of the crash all the same."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def every_crash(tmp_path: Path, prepare: Callable[[Path], Any], work: Callable[[Path, Any], object]) -> list[Path]:
    """Roots in which `work` was killed, one per point at which that is possible."""
    roots: list[Path] = []
    while True:
        root = tmp_path / str(len(roots))
        root.mkdir()
        prepared = prepare(root)
        if not killed_before(len(roots), lambda root=root, prepared=prepared: work(root, prepared)):  # type: ignore[misc]
            assert len(roots) > 3
            return roots
        roots.append(root)


def readable(root: Path) -> list[int]:
    """Steps that readers see, each proven whole."""
    listed = store.committed(root)
    for one in listed:
        verify(root, one.path)
        out = np.zeros((8, 6), np.float32)
        native.open_view(root, one.path).read("w", Box.whole((8, 6)), out)
        assert (out == WEIGHT + one.step).all()
    return [one.step for one in listed]


def test_commit(tmp_path: Path) -> None:
    seen = set()

    def prepare(root: Path) -> Any:
        save(root, step=20)
        return write_all(root, step=40)

    for root in every_crash(tmp_path, prepare, commit):
        seen.add(tuple(readable(root)))
        parts = [write_rank(root, rank, step=40) for rank in range(2)]  # the ranks report again
        commit(root, parts)
        assert readable(root) == [40, 20]
        assert not list((root / "step-00000040-gen-0003").glob(".*"))
    assert seen == {(20,), (40, 20)}  # kills came before and after the moment of the commit


def test_writing_a_part(tmp_path: Path) -> None:
    for root in every_crash(tmp_path, lambda root: save(root, step=20), lambda root, _: write_all(root, step=40)):
        assert readable(root) == [20]
        save(root, step=40)
        assert readable(root) == [40, 20]


def test_replacing_the_part_of_a_crashed_run(tmp_path: Path) -> None:
    """Never does an old checksum stand over new bytes, though the new file is as long as the old one."""
    reports: dict[Path, list[SaveReport]] = {}

    def prepare(root: Path) -> None:
        reports[root] = write_all(root)

    seen = set()
    for root in every_crash(tmp_path, prepare, lambda root, _: write_rank(root, 1, sign=-1)):
        try:
            commit(root, reports[root])
        except CheckpointError:
            assert readable(root) == []
        else:
            assert readable(root) == [40]
        seen.add(len(readable(root)))
    assert seen == {0, 1}


def test_prune(tmp_path: Path) -> None:
    seen = set()

    def prepare(root: Path) -> None:
        for step in (20, 40):
            save(root, step=step)
        write_rank(root, 0, step=90, generation=2)

    for root in every_crash(tmp_path, prepare, lambda root, _: store.prune(root, 1, (), 3)):
        seen.add(tuple(readable(root)))
        store.prune(root, 1, (), 3)
        assert readable(root) == [40]
        assert sorted(path.name for path in root.iterdir()) == ["lock", "step-00000040-gen-0003"]
    assert seen == {(40,), (40, 20)}


def test_fence(tmp_path: Path) -> None:
    seen = set()
    for root in every_crash(tmp_path, lambda root: store.fence(root, 3), lambda root, _: store.fence(root, 4)):
        seen.add(store.fenced(root))
        store.fence(root, 4)
        assert store.fenced(root) == 4
    assert seen == {3, 4}


def test_everything_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut keeps what was synced only: contents before names, and names before the report of success."""
    log: list[tuple[str, str]] = []
    real_replace = Path.replace

    def fsync(descriptor: int) -> None:
        log.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))

    def rename(path: Path, target: Path) -> Path:
        log.extend([("rename", str(path)), ("appear", str(target))])
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    parts = []
    for rank in range(2):
        parts.append(write_rank(tmp_path, rank))
        require_synced(log, 2, first=f"part-0000{rank}.safetensors", last=f"part-0000{rank}.json")
    commit(tmp_path, parts)
    require_synced(log, 1, first="manifest.json", last="manifest.json")
    store.fence(tmp_path, 4)
    require_synced(log, 1, first="fence", last="fence")


def require_synced(log: list[tuple[str, str]], renames: int, *, first: str, last: str) -> None:
    """One finished operation: contents synced before each rename, the directory after the last."""
    appeared = [name for what, name in log if what == "appear"]
    assert len(appeared) == renames
    assert appeared[0].endswith(first)
    assert appeared[-1].endswith(last)
    for index, (what, name) in enumerate(log):
        assert what != "rename" or ("sync", name) in log[:index]
    after = log[log.index(("appear", appeared[-1])) :]
    assert ("sync", str(Path(appeared[-1]).parent)) in after
    log.clear()


def test_the_name_of_a_new_directory_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    write_rank(tmp_path, 0)
    assert tmp_path.stat().st_ino in synced
