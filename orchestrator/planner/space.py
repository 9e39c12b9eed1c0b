"""All legal plans of a job as arrays, built one choice after another.

Rows begin as shapes (every axis but the data-parallel ones) and are joined with the samples of the fullest replica,
micro-batches, layers per stage, recomputation and (dp_replicate, dp_shard). The search joins only what it needs.

Left out is only what another plan dominates whatever the device: a micro-batch larger than needed for the same number
of micro-batches, and layers per stage that leave some stage fuller than another split and none emptier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from math import ceil
from typing import TypeAlias

import numpy as np

from orchestrator.core.spec import JobSpec
from orchestrator.core.types import Mesh
from orchestrator.planner.candidates import RECOMPUTATIONS, Candidates, Floats, Ints
from orchestrator.planner.legality import Legal, axis_bounds
from orchestrator.planner.pool import Pool
from orchestrator.planner.transformer import layer_flops, output_flops

Rows: TypeAlias = dict[str, Ints]
"""Choices made so far by name; all arrays have the same length."""
SHARDED = 8
"""Replicating the whole state costs memory and saves little beside fewer shards: only where the job file asks."""
_SPLIT = ("layers_first", "layers_middle", "layers_last")
_MOST_SIZES = 256
"""Replicas of more samples than this are offered so many sizes of micro-batches, evenly spaced by ratio."""
_FINE = 64
"""On nodes of several speeds every size up to this is offered, and beyond it such that neighbours differ little."""


def length(rows: Rows) -> int:
    """Number of rows."""
    return len(next(iter(rows.values())))


def take(rows: Rows, chosen: Ints | np.ndarray | slice) -> Rows:
    """The rows at the positions (or under the mask) `chosen`."""
    return {name: column[chosen] for name, column in rows.items()}


def _repeat(rows: Rows, counts: Ints) -> tuple[Rows, Ints]:
    """Each row `counts` times, and the position of each copy among those of its row."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    where = np.repeat(np.arange(len(counts)), counts)
    return take(rows, where), np.arange(total) - np.repeat(ends - counts, counts)


def _join(rows: Rows, keys: Sequence[Ints], choices: Callable[..., Ints], names: Sequence[str]) -> Rows:
    """Each row with each of the `choices` (an array of one row per choice) for its values of `keys`."""
    if not length(rows):
        return rows | {name: np.zeros(0, np.int64) for name in names}
    distinct, which = np.unique(np.stack(keys), axis=1, return_inverse=True)
    tables = [choices(*(int(key) for key in one)) for one in distinct.T]
    sizes = np.array([len(table) for table in tables])
    which = which.reshape(-1)
    repeated, position = _repeat(rows | {"_": which}, sizes[which])
    found = np.concatenate(tables)[(np.cumsum(sizes) - sizes)[repeated.pop("_")] + position]
    return repeated | {name: found[:, column] for column, name in enumerate(names)}


KEPT = (*(one.name for one in fields(Candidates)), "pool")
"""Columns of complete rows that say which plan it is."""


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several behind each other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Space:
    """The legal plans of `spec` on `pool` that use at least `least` devices."""

    spec: JobSpec
    pool: Pool
    sizes: Legal
    number: int = 0
    """Which of several pools it is: the column `pool`."""

    # ------------------------------------------------------------ the steps

    def shapes(self) -> Rows:
        """pp, interleave, cp, tp, ep, zero, and the most replicas that there are devices and samples for."""
        legal, spec = self.sizes, self.spec
        cells = list(product(legal.pp, legal.interleave, legal.cp, legal.tp, legal.ep, legal.zero))
        columns = np.array(cells, np.int64).reshape(-1, 6).T
        rows = dict(zip(("pp", "interleave", "cp", "tp", "ep", "zero"), columns, strict=True))
        layers = spec.model.layers if spec.model else np.iinfo(np.int64).max
        fits = (rows["interleave"] == 1) | ((rows["pp"] > 1) & (rows["pp"] * rows["interleave"] <= layers))
        if spec.model:
            fits &= spec.model.seq_length % (rows["cp"] * rows["tp"]) == 0
        asked = axis_bounds(spec, "tp").min > 1
        usable = np.zeros((max(legal.tp, default=0) + 1, 2), np.int64)
        for tp in legal.tp:
            usable[tp] = self.pool.grouped(tp, spec.min_nodes, asked)
        most, least = usable[rows["tp"]].T
        per_replica = rows["pp"] * rows["cp"] * rows["tp"]
        rows["most"] = np.minimum(most // per_replica, spec.global_batch)
        rows["least"] = np.maximum(1, -(-least // per_replica))
        rows = take(rows, fits & (rows["most"] >= rows["least"]))
        count = length(rows)
        return rows | {"shape": np.arange(count), "pool": np.full(count, self.number)}

    def loads(self, shapes: Rows) -> Rows:
        """Each shape with each number of `samples` its fullest replica can have, and `least` to `most` replicas."""
        counts, samples = self._loads
        first = np.searchsorted(counts, shapes["least"], side="left")
        last = np.searchsorted(counts, shapes["most"], side="left")
        rows, position = _repeat(shapes | {"first": first}, last - first + 1)
        which = rows.pop("first") + position
        lowest = np.concatenate([[1], counts[:-1] + 1])[which]
        rows["samples"] = samples[which]
        rows["least"], rows["most"] = np.maximum(rows["least"], lowest), np.minimum(rows["most"], counts[which])
        return rows

    def micro_batches(self, loads: Rows) -> Rows:
        """With each size and number of micro-batches."""
        wanted = self.spec.micro_batch
        names = ["micro_batch", "micro_batches"]
        rows = _join(loads, [loads["samples"]], lambda samples: self._sizes_of(samples, wanted), names)
        number, pp = rows["micro_batches"], rows["pp"]
        full = np.ones(len(pp), bool) if wanted is not None else number >= np.minimum(pp, rows["samples"])
        return take(rows, full & ((rows["interleave"] == 1) | (number % pp == 0)))

    def _sizes_of(self, samples: int, wanted: int | None) -> Ints:
        """As `_sizes`; on nodes of several speeds the fastest may take more than an equal share at once."""
        if not self.pool.mixed:
            return _sizes(samples, wanted)
        most = ceil(samples * self.pool.speeds[-1])
        found = _sizes(most, wanted)[:, 0]
        if wanted is None:  # a size between two of these may suit the slower ones better
            finer: Iterable[float] = ()
            if most > _FINE:
                finer = np.geomspace(_FINE, most, 1 + ceil(_FINE * np.log(most / _FINE)))
            found = np.unique([*found, *range(1, min(most, _FINE) + 1), *map(round, finer)])[::-1]
        return np.stack([found, -(-samples // found)], axis=1)

    def splits(self, rows: Rows) -> Rows:
        """With each number of layers of the first, the fullest middle and the last pipeline stage."""
        return _join(rows, [rows["pp"], rows["interleave"]], self._splits, _SPLIT)

    def recomputations(self, rows: Rows) -> Rows:
        """With each kind of recomputation; a model that is not described has none to choose."""
        kinds = len(RECOMPUTATIONS) if self.spec.model else 1
        rows, position = _repeat(rows, np.full(length(rows), kinds))
        return rows | {"recomputation": position}

    def replicas(self, rows: Rows) -> Rows:
        """With each dp_replicate x dp_shard of `least` to `most` replicas; one `zero` where nothing is sharded."""
        counts, dp_replicate, dp_shard = self._pairs
        first = np.searchsorted(counts, rows["least"], side="left")
        last = np.searchsorted(counts, rows["most"], side="right")
        rows, position = _repeat(rows | {"first": first}, np.maximum(0, last - first))
        which = rows.pop("first") + position
        rows |= {"dp_replicate": dp_replicate[which], "dp_shard": dp_shard[which]}
        legal = rows["dp_shard"] * rows["cp"] * rows["tp"] % rows["ep"] == 0
        if "dp_replicate" not in self.spec.parallelism and self.sizes.dp_shard.max >= SHARDED:
            legal &= (rows["dp_replicate"] == 1) | (rows["dp_shard"] >= SHARDED)
        if len(self.sizes.zero) > 1:
            legal &= (rows["dp_shard"] * rows["cp"] > 1) | (rows["zero"] == self.sizes.zero[-1])
        return take(rows, legal)

    def complete(self, loads: Rows) -> Rows:
        """Every legal plan of these loads."""
        return self.replicas(self.recomputations(self.splits(self.micro_batches(loads))))

    # ------------------------------------------------------------ bounds and samples of them

    def work(self, rows: Rows) -> Floats:
        """What each device of the fullest stage computes in a step at least, in layers and samples."""
        layers = -(-self.spec.model.layers // rows["pp"]) if self.spec.model else 1 / rows["pp"]
        return np.asarray(rows["samples"] * layers / (rows["cp"] * rows["tp"]))

    def least_splits(self, rows: Rows) -> Rows:
        """Layers per stage that no split of the layers is faster than: one stage with an even share, the ends small."""
        return _join(rows, [rows["pp"]], self._least_split, _SPLIT)

    def even_splits(self, rows: Rows) -> Rows:
        """With the one split whose fullest stage has fewest layers, the last of these stages still fewer."""
        return _join(rows, [rows["pp"], rows["interleave"]], self._even_split, _SPLIT)

    def smallest(self, rows: Rows) -> Rows:
        """Of each load only the smallest micro-batch, which needs least memory."""
        other = (rows["shape"][1:] != rows["shape"][:-1]) | (rows["samples"][1:] != rows["samples"][:-1])
        return take(rows, np.append(other, True)[: length(rows)])

    def largest(self, loads: Rows) -> Rows:
        """Of each shape only the load with the most replicas, and no fewer."""
        last = np.append(loads["shape"][1:] != loads["shape"][:-1], True)
        rows = take(loads, last[: length(loads)])
        return rows | {"least": rows["most"]}

    def divisions(self, rows: Rows) -> Ints:
        """In how many ways `replicas` divides each row, or a few more."""
        counts = self._pairs[0]
        first = np.searchsorted(counts, rows["least"], side="left")
        return np.asarray(np.maximum(0, np.searchsorted(counts, rows["most"], side="right") - first))

    def most_plans(self, loads: Rows) -> int:
        """How many plans there are of these loads, or a few more."""
        sizes = np.minimum(2 * np.sqrt(loads["samples"]) + 1, _MOST_SIZES)
        splits = {int(pp): len(self._splits(int(pp), 1)) for pp in np.unique(loads["pp"])}
        each = np.array([splits[int(pp)] for pp in loads["pp"]])
        return int((self.divisions(loads) * sizes * each).sum()) * len(RECOMPUTATIONS)

    def _least_split(self, pp: int) -> Ints:
        if self.spec.model is None:
            return np.zeros((1, 3), np.int64)
        share = -(-self.spec.model.layers // pp)
        return np.array([(share, 0, 0) if pp == 1 else (share, 0, 1) if pp == 2 else (1, share, 1)], np.int64)

    def _even_split(self, pp: int, interleave: int) -> Ints:
        found = self._splits(pp, interleave)
        return found[np.lexsort([found[:, 0], found[:, 2], found.max(axis=1)])[:1]]

    # ------------------------------------------------------------ what is joined

    @property
    def _loads(self) -> tuple[Ints, Ints]:
        return _loads(self.spec.global_batch, self.pool.devices)

    @property
    def _pairs(self) -> tuple[Ints, Ints, Ints]:
        replicate, shard = self.sizes.dp_replicate, self.sizes.dp_shard
        most = min(self.pool.devices, self.spec.global_batch)
        return _pairs(most, replicate.min, min(replicate.max, most), shard.min, min(shard.max, most))

    def _splits(self, pp: int, interleave: int) -> Ints:
        model = self.spec.model
        if model is None:
            return np.zeros((1, 3), np.int64)
        output = ceil(output_flops(model) / layer_flops(model))
        return stage_splits(model.layers, pp, interleave, output, self.pool.mixed)


def candidates(rows: Rows) -> Candidates:
    """Complete rows as what the models of memory and time take."""
    return Candidates(*(rows[name] for name in KEPT[:-1]))


def only(space: Space, mesh: Mesh) -> Rows:
    """Every legal plan of one mesh; none where it is not legal."""
    rows = space.shapes()
    replicas = mesh.dp_degree
    same = (rows["least"] <= replicas) & (rows["most"] >= replicas)
    for axis in ("pp", "cp", "tp", "ep"):
        same &= rows[axis] == getattr(mesh, axis)
    rows = take(rows, same)
    samples = -(-space.spec.global_batch // replicas)
    fixed = {"least": replicas, "most": replicas, "samples": samples}
    rows |= {name: np.full(length(rows), value) for name, value in fixed.items()}
    rows = space.replicas(space.micro_batches(rows))
    rows = take(rows, (rows["dp_replicate"] == mesh.dp_replicate) & (rows["dp_shard"] == mesh.dp_shard))
    return space.recomputations(space.splits(rows))


@cache
def _loads(global_batch: int, most: int) -> tuple[Ints, Ints]:
    """(replicas, samples): the most replicas, at most `most`, of which the fullest has so many samples."""
    replicas = np.arange(1, min(most, global_batch) + 1)
    samples = -(-global_batch // replicas)
    last = np.append(samples[1:] != samples[:-1], True)
    return replicas[last], samples[last]


@cache
def _pairs(most: int, *bounds: int) -> tuple[Ints, Ints, Ints]:
    """(product, dp_replicate, dp_shard) within bounds (least and most of both) and product, by product."""
    least_replicate, most_replicate, least_shard, most_shard = bounds
    replicate = np.arange(least_replicate, most_replicate + 1)
    sizes = np.maximum(0, np.minimum(most // replicate, most_shard) - least_shard + 1)
    rows, position = _repeat({"replicate": replicate}, sizes)
    shard = position + least_shard
    counts = rows["replicate"] * shard
    order = np.argsort(counts, kind="stable")
    return counts[order], rows["replicate"][order], shard[order]


def _sizes(samples: int, wanted: int | None) -> Ints:
    """(size, number) of micro-batches of a replica with `samples`; for each number the smallest size."""
    if wanted is not None:
        sizes: Iterable[int] = [min(wanted, samples)]
    elif samples <= _MOST_SIZES:
        sizes = {-(-samples // number) for number in range(1, samples + 1)}
    else:
        numbers = {round(float(number)) for number in np.geomspace(1, samples, _MOST_SIZES)}
        sizes = {-(-samples // number) for number in numbers}
    return np.array([(size, -(-samples // size)) for size in sorted(sizes, reverse=True)], np.int64)


@cache
def stage_splits(layers: int, stages: int, interleave: int, output: int, mixed: bool = False) -> Ints:
    """(first, fullest middle, last) layers per stage, each split such that no other is at most as full everywhere.

    Every stage has a layer per interleaved chunk at least. None has more than `output` (the output projection, in
    layers) and one over an even share: beyond that it is slower than with all stages even. Where devices are `mixed`
    the stage of the slowest ones may leave all but its fewest layers to the others.
    """
    most = -(-layers // stages) + 1 + output
    if mixed and stages > 1:
        most = max(most, -(-(layers - interleave) // (stages - 1)))
    if stages == 1:
        return np.array([(layers, 0, 0)], np.int64)
    if stages == 2:
        found = [(first, 0, layers - first) for first in range(interleave, layers - interleave + 1)]
    else:
        found = []
        for middle in range(interleave, most + 1):
            ends = layers - (stages - 2) * middle
            if ends < 2 * interleave:
                found.append((interleave, -(-(layers - 2 * interleave) // (stages - 2)), interleave))
                break
            found += [(first, middle, ends - first) for first in range(interleave, ends - interleave + 1)]
    return np.array([one for one in found if max(one) <= most], np.int64).reshape(-1, 3)


def stage_layers(layers: int, stages: int, first: int, last: int) -> tuple[int, ...]:
    """Layers of every stage; the middle ones share what the ends leave, the earlier ones with one more."""
    if stages == 1:
        return (layers,)
    if stages == 2:
        return (first, last)
    base, extra = divmod(layers - first - last, stages - 2)
    return (first, *(base + (stage < extra) for stage in range(stages - 2)), last)
