from pathlib import Path

import pytest

from orchestrator.controller.journal import MemoryJournal, SqliteJournal
from orchestrator.core.errors import Conflict, InvalidInput
from orchestrator.core.facts import Fact, GenerationEnded, JobAccepted, JobEnded, NodeLost
from orchestrator.core.spec import CheckpointSpec, FailureClass, JobSpec
from orchestrator.core.status import FailureStatus, Phase
from orchestrator.core.types import Entrypoint

SPEC = JobSpec("gpt", Entrypoint("train.py", ("--a", "b")), CheckpointSpec("file:///c"), 48)
FACTS: list[Fact] = [
    JobAccepted(1.0, SPEC, 3),
    NodeLost(2.0, "node-1", "no heartbeat"),
    GenerationEnded(3.0, 4, 17, "cause", FailureClass.USER, "sig"),
    JobEnded(4.0, Phase.FAILED, "why", FailureStatus("why", "node-1", 3, "Traceback ...")),
]


def test_what_was_appended_is_loaded_after_reopening(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "deep" / "journal.db")
    journal.append(FACTS[:1])
    journal.append(FACTS[1:])
    journal.close()
    again = SqliteJournal(tmp_path / "deep" / "journal.db")
    assert again.load() == FACTS
    again.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_only_the_newest_job_is_loaded(kind: str, tmp_path: Path) -> None:
    journal = MemoryJournal() if kind == "memory" else SqliteJournal(tmp_path / "j.db")
    journal.append([*FACTS, JobAccepted(9.0, SPEC, 4)])
    assert journal.load() == [JobAccepted(9.0, SPEC, 4)]
    journal.close()


def test_an_append_is_all_or_nothing(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.db")
    journal.append(FACTS[:1])
    with pytest.raises(AttributeError):
        journal.append([FACTS[1], "not a fact"])  # type: ignore[list-item]
    journal.append(FACTS[2:3])
    assert journal.load() == [FACTS[0], FACTS[2]]
    journal.close()


def test_a_second_controller_is_refused_until_the_first_has_closed(tmp_path: Path) -> None:
    first = SqliteJournal(tmp_path / "j.db")
    with pytest.raises(Conflict, match=r"another controller \(process \d+\) holds the journal"):
        SqliteJournal(tmp_path / "j.db")
    first.close()
    SqliteJournal(tmp_path / "j.db").close()


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j.db").write_bytes(b"this is not a database, and long enough to be looked at as one" * 20)
    with pytest.raises(InvalidInput, match="cannot be used as a journal"):
        SqliteJournal(tmp_path / "j.db")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="cannot be opened"):
        SqliteJournal(tmp_path / "file" / "j.db")


def test_an_unreadable_row_is_named(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.db")
    journal.append(FACTS[:1])
    journal._database.execute('INSERT INTO facts (time_s, body) VALUES (1, \'{"type": "Nonsense"}\')')
    with pytest.raises(InvalidInput, match="row 2"):
        journal.load()
    journal.close()
