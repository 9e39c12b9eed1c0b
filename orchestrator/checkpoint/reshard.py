"""From the boxes that were saved to the boxes that are wanted. Pure: boxes in, copies out."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.checkpoint.layout import Box, Chunk, LazyChunks


@dataclass(frozen=True, slots=True)
class Copy:
    """`source` (counted from the chunk's first element) -> `destination` (counted from the wanted box's first)."""

    chunk: Chunk
    source: Box
    destination: Box


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Copies that write no element twice, and the boxes of the tensor that no chunk holds."""

    copies: tuple[Copy, ...]
    missing: tuple[Box, ...]


def intersect(one: Box, other: Box) -> Box | None:
    """The elements that both boxes hold; None when there are none. Scalars share their one element."""
    offsets, sizes = [], []
    for a, a_size, b, b_size in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True):
        start = max(a, b)
        size = min(a + a_size, b + b_size) - start
        if size <= 0:
            return None
        offsets.append(start)
        sizes.append(size)
    return Box(tuple(offsets), tuple(sizes))


def subtract(box: Box, hole: Box) -> Iterator[Box]:
    """`box` without `hole` (a box inside it), as at most two boxes per dimension."""
    offsets, sizes = list(box.offsets), list(box.sizes)
    for dim, (start, size) in enumerate(zip(hole.offsets, hole.sizes, strict=True)):
        before, after = start - offsets[dim], offsets[dim] + sizes[dim] - (start + size)
        if before > 0:
            yield Box(tuple(offsets), (*sizes[:dim], before, *sizes[dim + 1 :]))
        if after > 0:
            yield Box((*offsets[:dim], start + size, *offsets[dim + 1 :]), (*sizes[:dim], after, *sizes[dim + 1 :]))
        offsets[dim], sizes[dim] = start, size


def plan_copies(wanted: Box, chunks: Iterable[Chunk]) -> CopyPlan:
    """How to fill `wanted` from `chunks`, reading every element once however often it was saved."""
    if wanted.elements == 0:
        return CopyPlan((), ())
    copies: list[Copy] = []
    remaining = [wanted]
    for chunk in chunks.touching(wanted) if isinstance(chunks, LazyChunks) else chunks:
        if not remaining:
            break
        if intersect(wanted, chunk.box) is None:
            continue
        still: list[Box] = []
        for box in remaining:
            shared = intersect(box, chunk.box)
            if shared is None:
                still.append(box)
                continue
            source, destination = shared.relative_to(chunk.box.offsets), shared.relative_to(wanted.offsets)
            copies.append(Copy(chunk, source, destination))
            still.extend(subtract(box, shared))
        remaining = still
    return CopyPlan(tuple(copies), tuple(remaining))


def overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes of one tensor that share an element, or None: a sweep along the dimension that separates most."""
    solid = [box for box in boxes if box.elements]
    if len(solid) < 2:
        return None
    dimensions = range(len(solid[0].offsets))
    if not dimensions:
        return solid[0], solid[1]
    along = max(dimensions, key=lambda dim: len({box.offsets[dim] for box in solid}))
    solid.sort(key=lambda box: box.offsets[along])
    active: list[tuple[int, int]] = []  # (end, index) of the boxes that reach beyond the sweep's position
    for index, box in enumerate(solid):
        while active and active[0][0] <= box.offsets[along]:
            heapq.heappop(active)
        for _, earlier in active:
            if intersect(box, solid[earlier]) is not None:
                return solid[earlier], box
        heapq.heappush(active, (box.offsets[along] + box.sizes[along], index))
    return None


def flaw(shape: tuple[int, ...], boxes: Iterable[Box]) -> str | None:
    """Why the distinct boxes do not hold every element of the tensor exactly once; None when they do.

    The same box twice is a replica, not an overlap.
    """
    distinct = list(dict.fromkeys(box for box in boxes if box.elements))
    shared = overlap(distinct)
    if shared is not None:
        return f"chunks {shared[0]} and {shared[1]} overlap"
    whole = Box.whole(shape)
    if sum(box.elements for box in distinct) == whole.elements:
        return None  # inside the tensor and disjoint: as many elements as it has are all of them
    remaining = [whole]
    for box in distinct:
        remaining = [rest for one in remaining for rest in _without(one, box)]
    return f"no chunk holds {', '.join(map(str, remaining[:3]))}"


def flaw_of(shape: tuple[int, ...], chunks: Iterable[Chunk]) -> str | None:
    """As `flaw`, of the boxes of these chunks."""
    return chunks.flaw(shape) if isinstance(chunks, LazyChunks) else flaw(shape, (chunk.box for chunk in chunks))


def _without(box: Box, other: Box) -> Iterable[Box]:
    shared = intersect(box, other)
    return (box,) if shared is None else subtract(box, shared)
