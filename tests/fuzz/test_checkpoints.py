"""Damaged and hostile checkpoints of every format: a clean error, or the very tensors that were saved.

Each case copies a tiny whole checkpoint, damages it once to three times, and does what a user does: open, prove,
compare checksums, read every tensor, and now and then convert. What may come of it:

1. one of regrow's own errors, one sentence that names a file of the checkpoint or its folder;
2. every tensor, and all that is said of them, as they were saved;
3. where a format cannot know better, exactly what its files now say:
   - plain safetensors (Hugging Face's and DCP's) have no checksum: a tensor is the bytes at its place, and in a file
     whose header was changed it is what the header says; a universal checkpoint whose description and index are gone
     is such files, too;
   - `.metadata` of DCP has no checksum: names and settings in it are believed, but every tensor is one that was saved;
   - files of ranks that carry no rank (ZeRO-3, tensor-parallel ranks, DCP's data files) and the values of DeepSpeed's
     universal form, which carry no name, can be exchanged or copied over one another: a tensor is then the bytes at its
     place in the files as they are now;
   - ZeRO-3's model files of ranks above 0 may be missing, as DeepSpeed itself sometimes leaves them out; Megatron's
     torch_dist without both files that say that it is one is a plain DCP checkpoint, and without any optimizer's file
     one that was saved without;
   - a state of DeepSpeed's universal form whose files are gone for a whole group of parameters was never there;
   - one more model file in DeepSpeed's universal form makes what is not trained pieces of unknown ranks, which are left
     out and named in a note;
   - whoever attacks on purpose writes matching checksums, and may then say what he likes of the values.

Never: another exception, a payload that runs, a file outside the target, a target after a failure, more than 64 MiB, or
more than five seconds of work.

`make fuzz` runs many more, random ones. A failure prints the mutations; `REGROW_FUZZ_CASES` and hypothesis' own
`--hypothesis-seed` run the same cases again.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from orchestrator.checkpoint.convert import Conversion, convert
from orchestrator.checkpoint.formats import SOURCES, open_checkpoint
from orchestrator.checkpoint.stream import Limits
from orchestrator.checkpoint.verify import check_bytes, prove
from orchestrator.core.errors import CorruptCheckpoint, RegrowError
from tests.fuzz import corpus, mutations
from tests.fuzz.corpus import Entry, Held
from tests.fuzz.mutations import ACCIDENTS, ATTACKS, CANARY, SEALED, Files, Link

CASES = int(os.environ.get("REGROW_FUZZ_CASES", "0"))
"""How many random cases to run over all formats; 0 = the same few thousand every time."""
DEAR = ("zero-3d", "deepspeed-universal", "deepspeed-universal-3", "megatron", "megatron-distributed", "megatron-dist")
LIMIT_BYTES = 64 << 20
ROOM_BYTES = 1 << 30
"""Of addresses, for cases that are not traced: threads' stacks and heaps take some without using them."""
LIMIT_S = 5
"""Of the processor: the machine may have much else to do."""
WAIT_S = 60
ONE_IN = 8
"""Of so many cases one is converted, and one has every allocation traced, which takes four times as long."""

NUMBER = st.integers(0, 2**20 - 1)
MUTATIONS = st.lists(
    st.tuples(st.sampled_from([*ACCIDENTS, *ATTACKS, "flip", "json", "pickle"]), NUMBER, NUMBER, NUMBER),
    min_size=1,
    max_size=3,
)


def cases(name: str) -> int:
    if CASES:
        return max(1, CASES // len(corpus.MAKERS))
    return 70 if name in DEAR else 160


@dataclass(frozen=True)
class Outcome:
    """What a user saw."""

    error: RegrowError | None = None
    source: str = ""
    tensors: Mapping[str, Held] | None = None
    said: Any = None
    notes: tuple[str, ...] = ()


class Slow(BaseException):
    """A case took too long; no handler of exceptions stops it."""


@contextmanager
def watched(limit_s: float = LIMIT_S) -> Iterator[None]:
    """Ends what hangs."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Slow(f"it took more than {limit_s} s of work or {WAIT_S} s of waiting")

    alarms = {signal.SIGPROF: (signal.ITIMER_PROF, limit_s), signal.SIGALRM: (signal.ITIMER_REAL, WAIT_S)}
    before = {number: signal.signal(number, late) for number in alarms}
    for timer, seconds in alarms.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in alarms.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def traced() -> Iterator[None]:
    """Counts what Python and numpy allocate."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < LIMIT_BYTES, f"it allocated {peak} bytes"
    finally:
        tracemalloc.stop()


@contextmanager
def confined() -> Iterator[None]:
    """Gigabytes are a `MemoryError`, which nothing may turn into one of regrow's own."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where cases are laid out, beside a file that none of them may read."""
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    folder = tmp_path_factory.mktemp("fuzz")
    if base is not None:
        shutil.rmtree(folder)
        folder = base / f"regrow-fuzz-{os.getpid()}"
        folder.mkdir()
    for source in SOURCES:  # so that no case pays for it
        importlib.import_module(f"orchestrator.checkpoint.formats.{source}")
    before = os.environ.get(CANARY)
    os.environ[CANARY] = str(folder / "canary")
    yield folder
    if before is None:
        del os.environ[CANARY]
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=list(corpus.MAKERS))
def entry(request: pytest.FixtureRequest, place: Path) -> Entry:
    return corpus.make(request.param, place / request.param)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here has to outlive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_any_damage_is_a_clean_error_or_changes_no_tensor(entry: Entry, place: Path) -> None:
    @settings(
        max_examples=cases(entry.name),
        derandomize=not CASES,
        database=None,
        deadline=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(MUTATIONS, st.integers(0, ONE_IN - 1))
    def run(mutated: list[tuple[str, int, int, int]], turn: int) -> None:
        files: Files = dict(entry.files)
        done = [(ACCIDENTS | ATTACKS)[kind](files, a, b, c) for kind, a, b, c in mutated]
        note("; ".join(done))
        attacked = any(kind in ATTACKS for kind, *_ in mutated)
        forged = SEALED in " ".join(done) or entry.name not in ("native", "universal")
        check(entry, files, place, attacked=attacked and forged, converting=turn == 0, tracing=turn == 1)

    run()


def test_every_format_has_a_corpus_that_reads(entry: Entry, place: Path) -> None:
    """Undamaged, every case would be the second outcome."""
    found = attempt(lay_out(entry, dict(entry.files), place), place, converting=True)
    assert found.error is None
    assert found.tensors == entry.tensors and found.said == entry.said


# ---------------------------------------------------------------- one case


def check(entry: Entry, files: Files, place: Path, *, attacked: bool, converting: bool, tracing: bool) -> None:
    folder = lay_out(entry, files, place)
    before = listing(place / "case")
    with watched(), traced() if tracing else confined():
        found = attempt(folder, place, converting=converting)
    assert not (place / "canary").exists(), "a payload has run"
    after = {one for one in listing(place / "case") if not one.startswith((".target.partial", "target"))}
    assert after == before, f"files came or went outside the target: {after ^ before}"
    if found.error is not None:
        assert not (place / "case" / "target").exists(), "there is a target after a failure"
        check_error(entry, files, found.error, folder)
    else:
        check_tensors(entry, files, found, attacked)


def lay_out(entry: Entry, files: Files, place: Path) -> Path:
    """Write the files; those that are as they were are links to the corpus."""
    base = place / "case"
    shutil.rmtree(base, ignore_errors=True)
    (base / "outside").mkdir(parents=True)
    save_file({}, base / "outside" / "secret.safetensors")
    folder = base / "inside" / entry.directory.name
    folder.mkdir(parents=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, Link):
            path.symlink_to(data.target)
        elif data is entry.files.get(name):
            path.hardlink_to(entry.directory / name)
        else:
            path.write_bytes(data)
    return folder


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def attempt(folder: Path, place: Path, *, converting: bool) -> Outcome:
    """What a user does."""
    try:
        view = open_checkpoint(folder)
        prove(view)
        check_bytes(view, threads=1)
        wanted = sum(one.size_bytes for one in view.tensors.values())
        assert wanted < LIMIT_BYTES, f"a small checkpoint says that it holds {wanted} bytes"
        found = Outcome(None, view.source, corpus.read_all(view), corpus.said(view), view.notes)
        if converting:
            target = place / "case" / "target"
            convert(folder, target, Conversion(limits=Limits(1 << 20, 1)))
            assert corpus.read_all(open_checkpoint(target)) == found.tensors
    except RegrowError as error:
        return Outcome(error)
    return found


def check_error(entry: Entry, files: Files, error: RegrowError, folder: Path) -> None:
    """One sentence of printable characters that names a file, or the folder, and the tensor where it is about one."""
    text = str(error)
    assert text and text.isprintable(), f"not one line of text: {text!r}"
    assert len(text) < 2000, f"{len(text)} characters: {text[:300]}"
    known = {part for name in (*files, *entry.files) for part in (name, name.rsplit("/", 1)[-1])}
    assert str(folder) in text or folder.name in text or any(name in text for name in known), f"no file: {text}"
    if isinstance(error, CorruptCheckpoint) and error.tensor is not None:
        assert error.tensor.isprintable() is False or error.tensor[:100] in text, f"no tensor: {text}"


def check_tensors(entry: Entry, files: Files, found: Outcome, attacked: bool) -> None:
    assert found.tensors is not None
    if found.tensors == entry.tensors and (found.said == entry.said or entry.raw or entry.unsigned):
        return
    if attacked:
        return  # under checksums of his own he may say what he likes
    said = any(name.endswith("metadata.json") and files[name] == entry.files.get(name) for name in files)
    there = any(name.endswith("common.pt") for name in files.keys() & entry.files)  # not moved to another iteration
    if entry.name == "megatron-dist" and not there and not said:
        return
    if entry.name == "megatron-distributed" and not any(name.endswith("distrib_optim.pt") for name in files):
        return  # saved without an optimizer, as far as anyone can tell
    contents = {name: data for name, data in files.items() if isinstance(data, bytes)}
    if found.source == "huggingface" and entry.name != "torch-bin":
        says = headers_say(contents)
        known = headers_say({name: data for name, data in contents.items() if name in entry.files})
        everything = [{name: one.get(name) for name in (one if entry.raw else found.tensors)} for one in (says, known)]
        assert found.tensors in everything
        return
    now = corpus.gathered(entry, contents)
    touched = {name for name in entry.files.keys() | files.keys() if files.get(name) != entry.files.get(name)}
    if touched & set(entry.unsigned):
        allowed = {*entry.tensors.values(), *(now or entry.tensors).values()}
        strange = [name for name, held in found.tensors.items() if held not in allowed]
        assert not strange, f"tensors that were never saved: {strange}"
        return
    if read_in_part(entry, files, found):
        assert all(held == entry.tensors.get(name) for name, held in found.tensors.items())
        return
    if lost_by_groups(entry, found):
        return
    if not entry.raw:
        owners = exchanged(entry, files, touched)
        assert owners, f"wrong and unnoticed: {different(entry, found)}"
        now = moved(entry, owners)
    if entry.raw and now is not None:  # small values are read at once: `now` has them from when the view was built
        early = [name for name, chunks in entry.chunks.items() if any(one.data is not None for one in chunks)]
        now |= {name: found.tensors[name] for name in early if name in found.tensors}
    assert found.tensors == now, f"not what the files say: {different(entry, found)}"


def read_in_part(entry: Entry, files: Files, found: Outcome) -> bool:
    """Whether it has one rank's model file more, and the notes say what is left out for that."""
    more = entry.name.startswith("deepspeed-universal") and any(map(entry.alike, files.keys() - entry.files.keys()))
    return more and "left out" in " ".join(found.notes)


def lost_by_groups(entry: Entry, found: Outcome) -> bool:
    """Whether all there is differs by nothing but a state that no parameter of a group has any more."""
    tensors = found.tensors or {}
    lost = entry.tensors.keys() - tensors.keys()
    if not entry.name.startswith("deepspeed-universal") or found.said[:-1] != entry.said[:-1] or not lost:
        return False
    groups = [set(group["params"]) for group in found.said[1]["param_groups"]]
    states = {name.rpartition(".")[2] for name in lost}
    gone = {state: {name.rpartition(".")[0] for name in lost if name.endswith(f".{state}")} for state in states}
    whole = all(names == set().union(*(group for group in groups if group & names)) for names in gone.values())
    return whole and all(held == entry.tensors[name] for name, held in tensors.items())


def exchanged(entry: Entry, files: Files, touched: set[str]) -> dict[str, str]:
    """Files that have the contents of another one that nothing tells from them -> that one."""
    found = {}
    for name in touched & entry.files.keys():
        data, kind = files.get(name), entry.alike(name)
        owners = [owner for owner in entry.files if kind is not None and entry.alike(owner) == kind]
        fitting = [owner for owner in owners if isinstance(data, bytes) and data.startswith(entry.files[owner])]
        if fitting and name not in fitting:
            found[name] = fitting[0]
    return found


def moved(entry: Entry, owners: Mapping[str, str]) -> Mapping[str, Held] | None:
    """The tensors when these files have others' contents, and all else is as it was."""
    now = corpus.gathered(entry, {name: entry.files[owners.get(name, name)] for name in entry.files})
    values = {
        one[0].file: name for name, one in entry.chunks.items() if len(one) == 1 and one[0].file in owners.values()
    }
    for name, chunks in entry.chunks.items():  # one tensor to a file: the archive's own name shifts its place
        owner = owners.get(chunks[0].file) if len(chunks) == 1 and entry.alike(chunks[0].file) == "values" else None
        if now is not None and owner in values:
            now[name] = entry.tensors[values[owner]]
    return now


def different(entry: Entry, found: Outcome) -> list[str]:
    tensors = found.tensors or {}
    names = [name for name in {**entry.tensors, **tensors} if entry.tensors.get(name) != tensors.get(name)]
    return names[:5] or [json.dumps(found.said), json.dumps(entry.said)]


def headers_say(files: Mapping[str, bytes]) -> dict[str, Held]:
    """What safetensors files hold, read without regrow; of one whose header makes no sense, nothing."""
    found = {}
    for name, data in files.items():
        if name.endswith(".safetensors"):
            with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
                found.update(header_says(data))
    return found


def header_says(data: bytes) -> dict[str, Held]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for tensor, one in header.items():
        begin, end = one["data_offsets"]
        found[tensor] = Held(one["dtype"], tuple(one["shape"]), data[8 + length + begin : 8 + length + end])
    return found


def test_the_checks_see_what_they_are_there_for(place: Path) -> None:
    """A canary that sings, a watchdog that bites."""
    import pickle

    pickle.loads(mutations.payload() + b".")
    assert (place / "canary").exists()
    (place / "canary").unlink()
    with pytest.raises(Slow), watched(0.1):
        while True:
            pass
