"""`regrow checkpoint inspect|verify|convert|diff|prune`."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from orchestrator.cli.options import Json
from orchestrator.core.errors import printable

if TYPE_CHECKING:
    from orchestrator.checkpoint.difference import Difference
    from orchestrator.checkpoint.language import Rules
    from orchestrator.checkpoint.stream import Limits, Progress
    from orchestrator.checkpoint.view import UniversalView

Location = Annotated[str, Parameter(help="A checkpoint of any format: a folder, a file or a URI.")]
Format = Annotated[str | None, Parameter(name="--from", help="Its format, where it is not to be recognised.")]
Tag = Annotated[
    str | None, Parameter(help="Which of several checkpoints: DeepSpeed's tag, or a step; else the newest.")
]
RuleSet = Annotated[
    str | None, Parameter(help="How model-parallel pieces make one tensor: a set of rules by name, or a YAML file.")
]
Memory = Annotated[str, Parameter(help="Most memory for buffers, for example 512MiB.")]
Workers = Annotated[int, Parameter(help="Threads; 0 = one per core, at most 8.")]

app = App(name="checkpoint", help="Inspect, verify, convert, compare or prune checkpoints.", help_format="plaintext")

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@app.command
def inspect(
    path: Location,
    /,
    *,
    source: Format = None,
    tag: Tag = None,
    rule_set: RuleSet = None,
    rules: Annotated[bool, Parameter(negative="", help="Show which rule took which tensor.")] = False,
    json: Json = False,
) -> None:
    """Show what a checkpoint holds, from its metadata alone.

    Example: regrow checkpoint inspect runs/gpt-1/checkpoints
    """
    from orchestrator.checkpoint.formats import open_checkpoint

    view = open_checkpoint(path, source=source, tag=tag, rules=_rules(rule_set))
    if json:
        print(jsonlib.dumps({"path": view.files.location} | _data(view)))
    else:
        _show(view, rules)


@app.command
def verify(path: Location, /, *, source: Format = None, tag: Tag = None, json: Json = False) -> None:
    """Read every byte of a checkpoint and compare it with its checksums (exit code 3 if it is corrupt).

    Of formats that keep no checksums, check that every element is there exactly once and can be read. Where several
    ranks hold a tensor, tell of copies that differ: one of them is used, or their mean.

    Example: regrow checkpoint verify runs/gpt-1/checkpoints/step-00000040-gen-0003
    """
    from orchestrator.checkpoint.agreement_of_copies import disagreements
    from orchestrator.checkpoint.formats import open_checkpoint
    from orchestrator.checkpoint.verify import verify_any

    found = verify_any(path, source=source, tag=tag)
    view = open_checkpoint(path, source=source, tag=tag)
    where, copies = view.files.location, [str(one) for one in disagreements(view)]
    if json:
        data = {"path": where, "bytes": found.bytes, "seconds": found.seconds, "tensors": found.tensors}
        print(jsonlib.dumps(data | {"bytes_without_checksum": found.unproven, "copies_that_differ": copies}))
        return
    print(f"{where} is whole: {found.tensors} tensors, {found.bytes} bytes in {found.seconds:.2f} s")
    if found.unproven:
        print(f"{found.unproven} of these bytes have no checksum in this format: they were read, not compared")
    for line in copies:
        print(f"note: {line}")


@app.command
def convert(
    path: Location,
    target: Annotated[Path, Parameter(help="The folder to make; for --to native, the folder of checkpoints.")],
    /,
    *,
    to: Annotated[str, Parameter(help="universal, native, dcp, deepspeed-universal or huggingface.")] = "universal",
    source: Format = None,
    tag: Tag = None,
    rule_set: RuleSet = None,
    ranks: Annotated[int | None, Parameter(help="--to native: parts to divide it into; else 1.")] = None,
    stage: Annotated[int | None, Parameter(help="--to deepspeed-universal: the ZeRO stage to load it; else 1.")] = None,
    dtype: Annotated[str | None, Parameter(help="--to huggingface: F32, BF16, F16; else as trained.")] = None,
    trust: Annotated[bool, Parameter(negative="", help="Do not compare the source with its checksums first.")] = False,
    durable: Annotated[bool, Parameter(negative="", help="Wait until it is on the disk; native always does.")] = False,
    memory: Memory = "512MiB",
    workers: Workers = 0,
    json: Json = False,
) -> None:
    """Write a checkpoint in another format, as a streamed copy; a killed conversion goes on where it was.

    The target appears under its name only when it is whole.

    Example: regrow checkpoint convert runs/deepspeed/global_step500 converted --to universal
    """
    from orchestrator.checkpoint.convert import Conversion
    from orchestrator.checkpoint.convert import convert as run

    _require_fitting(to, {"ranks": ranks, "stage": stage, "dtype": dtype})
    limits = replace(_limits(memory, workers), durable=durable)
    conversion = Conversion(to, ranks or 1, stage or 1, dtype, not trust, limits)
    with _bar(show=not json) as bar:
        done = run(path, target, conversion, source_format=source, tag=tag, rules=_rules(rule_set), begun=bar.begin)
    if json:
        head = {"source": done.source, "target": str(target), "to": to, "tensors": done.tensors, "bytes": done.bytes}
        print(jsonlib.dumps(head | {"seconds": done.seconds, "notes": list(done.notes)}))
        return
    print(f"{target}: {done.tensors} tensors of {done.source}, {done.bytes} bytes in {done.seconds:.2f} s")
    for note in done.notes:
        print(printable(f"note: {note}"))


@app.command
def diff(
    a: Location,
    b: Location,
    /,
    *,
    all: Annotated[bool, Parameter(negative="", help="List the equal tensors, too.")] = False,
    memory: Memory = "512MiB",
    workers: Workers = 0,
    json: Json = False,
) -> None:
    """Compare two checkpoints of any formats tensor by tensor (exit code 8 if they differ).

    Example: regrow checkpoint diff runs/gpt-1/checkpoints converted
    """
    from orchestrator.checkpoint.difference import compare
    from orchestrator.checkpoint.formats import open_checkpoint

    one, other = open_checkpoint(a), open_checkpoint(b)
    size_bytes = sum(tensor.size_bytes for name, tensor in one.tensors.items() if name in other.tensors)
    with _bar(show=not json) as bar:
        found = compare(one, other, limits=_limits(memory, workers), progress=bar.begin("comparing", size_bytes))
    if json:
        print(jsonlib.dumps(_difference(found)))
    else:
        _show_difference(found, one, other, everything=all)
    if not found.same:
        sys.exit(DIFFERENT)


DIFFERENT = 8
"""Exit code of `diff` when the checkpoints differ."""


@app.command
def prune(
    root: Annotated[str, Parameter(help="The folder of a job's native checkpoints.")],
    /,
    *,
    keep: Annotated[int, Parameter(help="How many of the newest committed checkpoints to keep.")],
    dry_run: Annotated[bool, Parameter(negative="", help="Only say what would be removed.")] = False,
    json: Json = False,
) -> None:
    """Remove all but the newest committed checkpoints of a folder; what was not committed is left to the controller.

    Example: regrow checkpoint prune runs/gpt-1/checkpoints --keep 3
    """
    from orchestrator.checkpoint.root import parse_root
    from orchestrator.checkpoint.store import committed
    from orchestrator.checkpoint.store import prune as remove
    from orchestrator.core.errors import CheckpointError, InvalidInput

    if keep < 1:
        raise InvalidInput(f"--keep {keep} would keep nothing: keep at least 1")
    where = parse_root(root)
    kept = committed(where)
    if not kept:
        raise CheckpointError(f"{where} holds no committed checkpoint: give the folder that checkpoint.uri names")
    removed = [one.path for one in kept[keep:]] if dry_run else remove(where, keep)
    if json:
        print(jsonlib.dumps({"removed": removed, "kept": [one.path for one in kept[:keep]], "dry_run": dry_run}))
        return
    for name in removed:
        print(f"{'would remove' if dry_run else 'removed'} {where / name}")
    print(f"{where}: {len(kept[:keep])} checkpoints {'would stay' if dry_run else 'kept'}")


# ---------------------------------------------------------------- arguments


def parse_bytes(text: str) -> int:
    """`512MiB` as a number of bytes; raises `InvalidInput` for anything that is none."""
    from orchestrator.core.errors import InvalidInput

    digits = text.strip().rstrip("BKMGIbkmgi ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        return int(float(digits) * UNITS[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise InvalidInput(f"{text!r} is not an amount of memory: give one like 512MiB") from error


def _require_fitting(to: str, given: dict[str, object]) -> None:
    """Raises `InvalidInput` for an option that the target knows nothing of, or a count of zero."""
    from orchestrator.core.errors import InvalidInput

    fitting = {"ranks": "native", "stage": "deepspeed-universal", "dtype": "huggingface"}
    for name, value in given.items():
        if value is not None and to != fitting[name]:
            raise InvalidInput(f"--{name} is for --to {fitting[name]}, not for --to {to}: leave it out")
        if value == 0:
            raise InvalidInput(f"--{name} 0 is none: give at least 1")


def _limits(memory: str, workers: int) -> Limits:
    from orchestrator.checkpoint.stream import Limits
    from orchestrator.core.errors import InvalidInput

    count = parse_bytes(memory)
    if count < 1 << 20:
        raise InvalidInput(f"--memory {memory} is too little: give at least 1MiB")
    if workers < 0:
        raise InvalidInput(f"--workers {workers} is not a number of threads: give 0 for one per core")
    return Limits(count, workers)


def _rules(name: str | None) -> Rules | None:
    if name is None:
        return None
    from orchestrator.checkpoint.rulefile import named

    return named(name)


# ---------------------------------------------------------------- what is shown


class _Bar:
    """A progress bar of bytes on the terminal; nothing where there is none."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress

    def begin(self, words: str, total_bytes: int) -> Progress:
        """A stage begins; returns what counts its bytes."""
        if self.progress is None:
            return lambda count: None
        task = self.progress.add_task(words, total=total_bytes)
        return lambda count: self.progress.advance(task, count)


@contextmanager
def _bar(*, show: bool) -> Iterator[_Bar]:
    if not show or not sys.stderr.isatty():
        yield _Bar(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress)


def _data(view: UniversalView) -> dict[str, Any]:
    tensors = [
        {
            "name": one.name,
            "kind": one.kind,
            "dtype": one.dtype,
            "shape": list(one.shape),
            "chunks": len(one.chunks),
            "rule": one.rule,
        }
        for one in view.tensors.values()
    ]
    size_bytes = sum(one.size_bytes for one in view.tensors.values())
    return {
        "source": view.source,
        "step": view.step,
        "generation": view.generation,
        "bytes": size_bytes,
        "tensors": tensors,
        "aliases": view.aliases,
        "frozen": sorted(view.frozen),
        "state": view.state,
        "notes": list(view.notes),
    }


def _show(view: UniversalView, rules: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("tensor", "kind", "dtype", "shape", "chunks", *(("rule",) if rules else ())):
        table.add_column(column, overflow="fold")
    for one in view.tensors.values():
        shape = " x ".join(map(str, one.shape)) or "scalar"
        kind = "frozen" if one.name in view.frozen else one.kind
        rule = (one.rule or "whole",) if rules else ()
        cells = (one.name, kind, one.dtype, shape, str(len(one.chunks)), *rule)
        table.add_row(*(Text(printable(cell)) for cell in cells))  # brackets in names are no markup
    size_bytes = sum(one.size_bytes for one in view.tensors.values())
    of = f" of generation {view.generation}" if view.generation else ""
    print(
        f"{view.files.location}: {view.source}, step {view.step}{of}, {len(view.tensors)} tensors, {size_bytes} bytes"
    )
    Console().print(table)
    for alias, name in view.aliases.items():
        print(printable(f"{alias} is tied to {name}"))
    for note in view.notes:
        print(printable(f"note: {note}"))


def _difference(found: Difference) -> dict[str, Any]:
    tensors = [
        {
            "name": one.name,
            "state": one.state,
            "same": one.same,
            "shapes": [list(shape) for shape in one.shapes],
            "dtypes": list(one.dtypes),
            "differing": one.differing,
            "largest_absolute": one.largest_absolute,
            "largest_relative": one.largest_relative,
        }
        for one in found.tensors
    ]
    head = {"same": found.same, "only_a": list(found.only_a), "only_b": list(found.only_b)}
    return head | {"described": list(found.described), "tensors": tensors}


def _show_difference(found: Difference, a: UniversalView, b: UniversalView, *, everything: bool) -> None:
    for view, names in ((a, found.only_a), (b, found.only_b)):
        for name in names:
            print(printable(f"{name}: only in {view.files.location}"))
    for line in found.described:
        print(printable(line))
    for one in found.tensors:
        if everything or not one.same:
            print(printable(f"{one.name}: {one.words}"))
    same = sum(one.same for one in found.tensors)
    print(f"{same} of {len(found.tensors)} common tensors are equal, value by value")
