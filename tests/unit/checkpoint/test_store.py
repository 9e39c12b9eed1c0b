"""Commit, fencing, listing and retention."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import store
from orchestrator.checkpoint.durable import locked, replace_durably
from orchestrator.checkpoint.verify import verify
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint, InvalidInput, Refused
from orchestrator.core.types import SaveReport
from tests.unit.checkpoint.saving import commit, save, write_all, write_rank


def test_what_is_not_committed_does_not_exist(tmp_path: Path) -> None:
    parts = write_all(tmp_path)
    assert store.committed(tmp_path) == []
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        verify(tmp_path, "step-00000040-gen-0003")
    done = commit(tmp_path, parts)
    assert (done.step, done.generation, done.path) == (40, 3, "step-00000040-gen-0003")
    assert done.size_bytes == sum(part.size_bytes for part in parts)
    assert done.seconds >= max(part.write_s for part in parts)
    assert store.committed(tmp_path) == [done]
    assert store.latest(tmp_path.as_uri()) == done


def test_a_commit_may_be_repeated(tmp_path: Path) -> None:
    parts = write_all(tmp_path)
    done = commit(tmp_path, parts)
    manifest = (tmp_path / done.path / "manifest.json").read_bytes()
    assert commit(tmp_path, list(reversed(parts))) == done
    store.fence(tmp_path, 9)
    assert commit(tmp_path, parts) == done  # it was made before the fence: nothing is to be decided any more
    assert (tmp_path / done.path / "manifest.json").read_bytes() == manifest


def change(index: int, **fields: Any) -> Callable[[list[SaveReport]], list[SaveReport]]:
    return lambda parts: [*parts[:index], replace(parts[index], **fields), *parts[index + 1 :]]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda parts: parts[:1], "1 parts are not one of each of 2 ranks"),
        (lambda parts: [parts[0], parts[0]], "not one of each"),
        (change(1, generation=4), "of generation 4"),
        (change(1, step=41), "of step 41"),
        (change(1, part="../step-00000040-gen-0003/part-00001.json"), r"\.\./"),
        (change(1, part="step-00000040-gen-0003/part-00000.json"), "part-00000.json"),
        (change(1, digest="0" * 32), r"part-00001\.json is corrupt: its checksum"),
        (change(1, size_bytes=7), r"part-00001\.json is corrupt"),
    ],
)
def test_reports_that_do_not_fit_are_not_committed(
    tmp_path: Path, damage: Callable[[list[SaveReport]], list[SaveReport]], words: str
) -> None:
    parts = damage(write_all(tmp_path))
    with pytest.raises(CheckpointError, match=words):
        store.commit(tmp_path, generation=3, step=40, world_size=2, parts=parts)
    assert store.committed(tmp_path) == []


@pytest.mark.parametrize("name", ["part-00001.json", "part-00001.safetensors"])
def test_a_part_that_is_gone_is_not_committed(tmp_path: Path, name: str) -> None:
    parts = write_all(tmp_path)
    (tmp_path / "step-00000040-gen-0003" / name).unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{name} is corrupt.*it is missing"):
        commit(tmp_path, parts)


def test_a_directory_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    parts = write_all(tmp_path)
    (tmp_path / "step-00000040-gen-0003").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="does not exist: save it again"):
        commit(tmp_path, parts)


def test_another_commit_under_the_same_name_is_refused(tmp_path: Path) -> None:
    parts = write_all(tmp_path)
    commit(tmp_path, parts)
    with pytest.raises(Refused, match="committed already with other parts"):
        commit(tmp_path, [replace(parts[0], digest="0" * 32), parts[1]])


# ---------------------------------------------------------------- fencing


def test_an_older_generation_cannot_commit_after_a_newer_one_began(tmp_path: Path) -> None:
    parts = write_all(tmp_path, generation=3)
    store.fence(tmp_path, 4)
    with pytest.raises(Refused, match=r"generation 3 may not write.*generation 4 has begun"):
        commit(tmp_path, parts)
    assert store.committed(tmp_path) == []
    assert save(tmp_path, generation=4).generation == 4


def test_an_older_generation_cannot_commit_after_a_newer_one_has(tmp_path: Path) -> None:
    parts = write_all(tmp_path, step=50, generation=3)
    save(tmp_path, step=40, generation=4)
    with pytest.raises(Refused, match="the newer step-00000040-gen-0004 is committed"):
        commit(tmp_path, parts)


def test_the_fence_only_rises(tmp_path: Path) -> None:
    store.fence(tmp_path, 3)
    store.fence(tmp_path, 3)
    store.fence(tmp_path, 5)
    with pytest.raises(Refused, match=r"generation 4 is refused.*generation 5 has begun"):
        store.fence(tmp_path, 4)
    assert store.fenced(tmp_path) == 5


@pytest.mark.parametrize("text", [b"", b"x", b"-1", b"3.5", b"\xff", b"9" * 30, "٣".encode()])
def test_a_damaged_fence_stops_writers_instead_of_letting_them_through(tmp_path: Path, text: bytes) -> None:
    parts = write_all(tmp_path)
    (tmp_path / "fence").write_bytes(text)
    with pytest.raises(CheckpointError, match="fence"):
        commit(tmp_path, parts)


def test_a_commit_that_waits_for_a_fence_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fence is asked for under the lock: a commit that was checked before the fence rose cannot slip through."""
    parts = write_all(tmp_path)
    waits = threading.Event()
    raised: list[BaseException] = []

    @contextmanager
    def announced(*args: Any, **options: Any) -> Iterator[None]:
        waits.set()
        with locked(*args, **options):
            yield

    def late() -> None:
        try:
            commit(tmp_path, parts)
        except Refused as error:
            raised.append(error)

    thread = threading.Thread(target=late)
    with locked(tmp_path):
        monkeypatch.setattr(store, "locked", announced)
        thread.start()
        assert waits.wait(30)
        replace_durably(tmp_path / "fence", b"4\n")
    thread.join(30)
    assert len(raised) == 1
    assert store.committed(tmp_path) == []


def test_a_part_replaced_after_its_check_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_all(tmp_path)

    @contextmanager
    def late(*args: Any, **options: Any) -> Iterator[None]:
        write_rank(tmp_path, 1, sign=-1)
        with locked(*args, **options):
            yield

    monkeypatch.setattr(store, "locked", late)
    with pytest.raises(CorruptCheckpoint, match=r"part-00001\.json"):
        commit(tmp_path, parts)


def test_a_new_run_can_start_above_everything_that_was(tmp_path: Path) -> None:
    save(tmp_path, generation=3)
    assert store.newest_generation(tmp_path) == 3
    write_rank(tmp_path, 0, generation=5)
    assert store.newest_generation(tmp_path) == 5
    store.fence(tmp_path, 8)
    assert store.newest_generation(tmp_path) == 8


# ---------------------------------------------------------------- listing and retention


def test_newest_means_highest_step_then_generation(tmp_path: Path) -> None:
    for step, generation in [(20, 1), (40, 1), (30, 2), (40, 2)]:
        save(tmp_path, step=step, generation=generation)
    assert [(one.step, one.generation) for one in store.committed(tmp_path)] == [(40, 2), (40, 1), (30, 2), (20, 1)]


def test_a_damaged_manifest_hides_only_its_own_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, step=20)
    newest = save(tmp_path, step=40)
    (tmp_path / newest.path / "manifest.json").write_text("{}")
    assert [one.step for one in store.committed(tmp_path)] == [20]
    assert store.prune(tmp_path, 1, (), 9) == []  # nor is it garbage: somebody may want to look at it


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step=step)
    removed = store.prune(tmp_path, 2, (10, "step-00000020-gen-0003"), 3)
    assert removed == ["step-00000030-gen-0003"]
    assert [one.step for one in store.committed(tmp_path)] == [50, 40, 20, 10]
    assert sorted(store.prune(tmp_path, 1, (), 3)) == [f"step-{step:08d}-gen-0003" for step in (10, 20, 40)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "step-00000050-gen-0003"]


def test_prune_collects_what_can_never_be_committed(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, step=90, generation=2)  # of an older generation
    write_rank(tmp_path, 0, step=30, generation=3)  # before a step of its generation that every rank has reached
    write_rank(tmp_path, 0, step=50, generation=3)  # under way
    write_rank(tmp_path, 0, step=20, generation=4)  # newer than the caller knows
    save(tmp_path, step=10, generation=1)
    save(tmp_path, step=40, generation=3)
    assert sorted(store.prune(tmp_path, 5, (), 3)) == ["step-00000030-gen-0003", "step-00000090-gen-0002"]
    assert [one.step for one in store.committed(tmp_path)] == [40, 10]
    assert (tmp_path / "step-00000050-gen-0003").is_dir()
    assert (tmp_path / "step-00000020-gen-0004").is_dir()


def test_prune_finishes_what_a_crash_left(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / ".removed-step-00000010-gen-0001-5").mkdir()
    (tmp_path / ".removed-step-00000010-gen-0001-5" / "part-00000.json").write_text("{}")
    assert store.prune(tmp_path, 1) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "step-00000040-gen-0003"]


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="keep at least 1"):
        store.prune(tmp_path, 0)
