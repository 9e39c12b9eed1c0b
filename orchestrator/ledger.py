"""The ledger of a run: which samples each step consumed and what its loss was, over all generations.

A worker writes `gen-%04d-rank-%05d.jsonl` when `REGROW_LEDGER` names a directory, one line per step:

    {"step": n, "samples": [dataset indices], "loss": share}

Only ranks that consume data on their own write (first on `tp`, last on `pp`; of the `cp` ranks the first one names the
samples). `loss` is the rank's share of the global mean loss, null where the script reported none: the shares of a step
add up to the exact mean, so that a killed rank can take no loss of a committed step with it. Lines are written before
the step can be saved, so the highest generation that has a step has all of it, or a still higher one repeats it.
Reads files only; imports nothing but the standard library.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"gen-(\d+)-rank-(\d+)\.jsonl")


class Record(NamedTuple):
    """One step as it counts: the dataset indices in the order of the global batch, and the global mean loss."""

    samples: tuple[int, ...]
    loss: float | None


class Comparison(NamedTuple):
    """How a run differs from an undisturbed one."""

    max_loss_difference: float
    """Largest relative difference of the losses of one step; infinite when a loss is not finite in just one run."""
    samples_lost: int
    samples_repeated: int


class Writer:
    """Appends one rank's lines; every line reaches the operating system at once, so that SIGKILL loses none."""

    def __init__(self, directory: Path, generation: int, rank: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"gen-{generation:04d}-rank-{rank:05d}.jsonl"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, step: int, samples: Sequence[int], loss: float | None) -> None:
        """Record that `step` (1 = the first) consumed `samples` here; `loss` is this rank's share."""
        line = json.dumps({"step": step, "samples": list(samples), "loss": loss}, separators=(",", ":")) + "\n"
        os.write(self._descriptor, line.encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _lines(path: Path) -> Iterator[tuple[int, list[int], float | None]]:
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):  # the last line of a killed worker may be cut off
                record = json.loads(line)
                yield record["step"], record["samples"], record["loss"]


def effective(directory: Path | str) -> dict[int, Record]:
    """Every step as it counts: of its highest generation, with the samples of all ranks in rank order."""
    newest: dict[int, int] = {}
    parts: dict[tuple[int, int], list[tuple[int, list[int], float | None]]] = defaultdict(list)
    for path in Path(directory).glob("gen-*-rank-*.jsonl"):
        if (match := _NAME.fullmatch(path.name)) is None:
            continue
        generation, rank = int(match[1]), int(match[2])
        for step, samples, loss in _lines(path):
            newest[step] = max(newest.get(step, 0), generation)
            parts[generation, step].append((rank, samples, loss))
    return {step: _join(parts[generation, step]) for step, generation in sorted(newest.items())}


def _join(parts: list[tuple[int, list[int], float | None]]) -> Record:
    parts = sorted(parts)
    shares = [loss for _, _, loss in parts if loss is not None]
    samples = tuple(sample for _, chosen, _ in parts for sample in chosen)
    return Record(samples, math.fsum(shares) if len(shares) == len(parts) else None)


def _difference(first: float | None, second: float | None) -> float:
    if first is None or second is None or first == second:
        return 0.0
    if not (math.isfinite(first) and math.isfinite(second)):
        return 0.0 if math.isnan(first) and math.isnan(second) else math.inf
    return abs(first - second) / max(abs(first), abs(second))


def compare(run: Mapping[int, Record], undisturbed: Mapping[int, Record]) -> Comparison:
    """What `run` lost or repeated against `undisturbed`, step by step (both as from `effective`)."""
    difference, lost, repeated = 0.0, 0, 0
    nothing = Record((), None)
    for step in run.keys() | undisturbed.keys():
        ours, theirs = run.get(step, nothing), undisturbed.get(step, nothing)
        lost += (Counter(theirs.samples) - Counter(ours.samples)).total()
        repeated += (Counter(ours.samples) - Counter(theirs.samples)).total()
        difference = max(difference, _difference(ours.loss, theirs.loss))
    return Comparison(difference, lost, repeated)
