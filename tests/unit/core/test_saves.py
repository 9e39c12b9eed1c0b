from orchestrator.core.saves import COMMIT_TRIES, Saves
from orchestrator.core.types import SaveReport


def part(generation: int, step: int, rank: int) -> SaveReport:
    return SaveReport(generation, step, rank, f"part-{rank}", "digest", 10, 0.0, 0.0)


def test_a_step_is_complete_once_every_rank_has_saved_it() -> None:
    saves = Saves(generation=2)
    saves.add([part(2, 10, 0)], newer_than=-1)
    assert saves.complete(2) == []
    saves.add([part(2, 10, 1), part(2, 10, 0)], newer_than=-1)
    assert saves.complete(2) == [(10, (part(2, 10, 0), part(2, 10, 1)))]


def test_parts_of_another_generation_are_refused() -> None:
    saves = Saves(generation=2)
    saves.add([part(1, 10, 0), part(2, 10, 1), part(3, 10, 0)], newer_than=-1)
    assert saves.complete(2) == []


def test_what_is_committed_already_is_not_taken_in_again() -> None:
    saves = Saves(generation=2)
    saves.add([part(2, 10, 0)], newer_than=10)
    assert saves.complete(1) == []


def test_a_step_is_offered_once_and_older_ones_are_forgotten_when_it_is_committed() -> None:
    saves = Saves(generation=1)
    saves.add([part(1, 10, 0), part(1, 20, 0)], newer_than=-1)
    assert [step for step, _ in saves.complete(1)] == [10, 20]
    saves.committing.add(20)
    assert [step for step, _ in saves.complete(1)] == [10]
    saves.settle(20, committed=True)
    assert saves.complete(1) == []


def test_a_commit_that_keeps_failing_is_given_up() -> None:
    saves = Saves(generation=1)
    for _ in range(COMMIT_TRIES):
        saves.add([part(1, 10, 0)], newer_than=-1)
        assert saves.complete(1)
        saves.committing.add(10)
        saves.settle(10, committed=False)
    saves.add([part(1, 10, 0)], newer_than=-1)
    assert saves.complete(1) == []
