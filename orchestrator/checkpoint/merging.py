"""From the shards of model-parallel ranks to one logical tensor: boxes are moved and cut, no byte is copied. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from orchestrator.checkpoint.layout import (
    ITEM_BYTES,
    Box,
    Chunk,
    LogicalTensor,
    flat_boxes,
    is_row_major,
    row_major,
)
from orchestrator.checkpoint.patterns import Average, Expert, Flat, Fragment, Padding, Replicated, Rule, Unique
from orchestrator.core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Shard:
    """What one model-parallel rank holds of a tensor: chunks whose boxes count from the shard's own first element."""

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def merge(
    name: str,
    parameter: str,
    state: str | None,
    kind: str,
    dtype: str,
    rule: Rule,
    shards: Sequence[Shard],
    *,
    shape: tuple[int, ...] | None = None,
) -> LogicalTensor:
    """The logical tensor `name` of which `shards`, in rank order, are the ranks' pieces, as `rule` says.

    The states of a parameter follow the parameter's rule; scalars (shape `()`) and states named `step` are the same on
    every rank whatever the rule. Chunks may hold a shard in any boxes, or not all of it: the caller checks coverage.
    `shape`, of the merged tensor before padding is left out, is needed for flat shards only, which do not have it.
    Raises `CheckpointError`, naming the tensor and the rule, when the shards do not fit the rule.
    """
    merger = _Merger(name, rule, ITEM_BYTES[dtype])
    if not shards:
        raise merger.misfit("no rank holds it")
    pattern = rule.pattern
    scalar = state is not None and (state == "step" or all(not shard.shape for shard in shards))
    others: tuple[tuple[Chunk, ...], ...] = ()
    if scalar or isinstance(pattern, Replicated | Average | Unique):
        if len(shards) > 1 and isinstance(pattern, Unique) and not scalar:
            raise merger.misfit(f"{len(shards)} ranks hold it")
        full, chunks = merger.same(shards), shards[0].chunks
        others = tuple(shard.chunks for shard in shards[1:])
    elif isinstance(pattern, Flat):
        full, chunks = merger.flat(shards, shape)
    else:
        fragment = Fragment(pattern.dim) if isinstance(pattern, Expert) else pattern
        full, chunks = merger.fragments(fragment, shards)
    if rule.padded is not None and not scalar:
        full, chunks, others = merger.without_padding(rule.padded, full, chunks, others)
    return LogicalTensor(
        name,
        parameter,
        state,
        kind,
        dtype,
        full,
        chunks,
        others,
        average=isinstance(pattern, Average) and not scalar,
        rule=str(Replicated() if scalar else rule),
    )


def cut(chunk: Chunk, box: Box, item_bytes: int) -> Chunk:
    """The part of `chunk` that `box`, a box inside the chunk's and counted as that is, holds."""
    if box == chunk.box:
        return chunk
    inner = box.relative_to(chunk.box.offsets)
    if chunk.data is not None:
        return replace(chunk, box=box, begin=0, data=b"".join(_rows(chunk, inner, item_bytes)), digest=None)
    strides = row_major(chunk.box.sizes) if chunk.strides is None else chunk.strides
    plain = None if is_row_major(box.sizes, strides) else strides
    if chunk.blob_bytes is None:
        return Chunk(box, chunk.file, chunk.begin + _dot(inner.offsets, strides) * item_bytes, strides=plain)
    return replace(_skipping(chunk, _dot(inner.offsets, strides), item_bytes), box=box, strides=plain)


def select(chunk: Chunk, index: int, item_bytes: int) -> Chunk:
    """Index `index` of the first dimension of a chunk that holds it, as a chunk of a tensor without that dimension."""
    part = cut(chunk, _along(chunk.box, 0, index, 1), item_bytes)
    part = _skipping(part, 0, item_bytes)
    strides = None if part.strides is None else part.strides[1:]
    return replace(part, box=Box(part.box.offsets[1:], part.box.sizes[1:]), strides=strides)


def unflatten(chunk: Chunk, shape: tuple[int, ...], start: int, count: int, item_bytes: int) -> Iterator[Chunk]:
    """The first `count` elements of a contiguous chunk, which are those from `start` on of a tensor of this shape."""
    for before, box in flat_boxes(shape, start, count):
        whole = before == 0 and box.elements == chunk.box.elements
        digest = chunk.digest if whole else None
        yield replace(_skipping(chunk, before, item_bytes), box=box, strides=None, digest=digest)


def _skipping(chunk: Chunk, elements: int, item_bytes: int) -> Chunk:
    """The chunk from so many elements on, counted in its file or in its serialised tensor."""
    if chunk.blob_bytes is None:
        return replace(chunk, begin=chunk.begin + elements * item_bytes, digest=None)
    shape = chunk.box.sizes if chunk.blob_shape is None else chunk.blob_shape
    return replace(chunk, blob_shape=shape, blob_skip=chunk.blob_skip + elements, digest=None)


def _dot(offsets: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))


def _rows(chunk: Chunk, inner: Box, item_bytes: int) -> Iterator[bytes]:
    """The bytes of a box of an inline chunk, row by row."""
    assert chunk.data is not None
    strides = row_major(chunk.box.sizes)
    starts = [chunk.begin + _dot(inner.offsets, strides) * item_bytes]
    for size, stride in zip(inner.sizes[:-1], strides[:-1], strict=True):
        starts = [start + index * stride * item_bytes for start in starts for index in range(size)]
    count = inner.sizes[-1] * item_bytes
    for start in starts:
        yield chunk.data[start : start + count]


class _Merger:
    """The merging of one tensor, with errors that name it and its rule."""

    def __init__(self, name: str, rule: Rule, item_bytes: int) -> None:
        self.name, self.rule, self.item_bytes = name, rule, item_bytes

    def misfit(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name} does not fit the rule {self.rule.match!r} ({self.rule}): {reason}; give rules that fit the "
            "model, or restore the missing ranks' files"
        )

    def same(self, shards: Sequence[Shard]) -> tuple[int, ...]:
        """The shape that all shards have."""
        shape = shards[0].shape
        for rank, shard in enumerate(shards):
            if shard.shape != shape:
                raise self.misfit(f"rank {rank} holds the shape {list(shard.shape)} but rank 0 {list(shape)}")
        return shape

    def dimension(self, dim: int, shape: tuple[int, ...]) -> int:
        if not -len(shape) <= dim < len(shape):
            raise self.misfit(f"its shape {list(shape)} has no dimension {dim}")
        return dim % len(shape)

    # ------------------------------------------------------------ fragments

    def fragments(self, fragment: Fragment, shards: Sequence[Shard]) -> tuple[tuple[int, ...], tuple[Chunk, ...]]:
        """Shape and chunks of the whole tensor: section after section, and in each rank after rank."""
        dim = self.dimension(fragment.dim, shards[0].shape)
        rest = _without(shards[0].shape, dim)
        for rank, shard in enumerate(shards):
            if len(shard.shape) != len(rest) + 1 or _without(shard.shape, dim) != rest:
                raise self.misfit(
                    f"rank {rank} holds the shape {list(shard.shape)} but rank 0 {list(shards[0].shape)}, which differ "
                    f"in more than dimension {dim}"
                )
        extents = [shard.shape[dim] for shard in shards]
        widths = self.widths(fragment, extents)
        full = (*shards[0].shape[:dim], sum(extents), *shards[0].shape[dim + 1 :])
        chunks: list[Chunk] = []
        for rank, shard in enumerate(shards):
            chunks += self.moved(shard.chunks, dim, _spans(widths, rank))
        return full, tuple(chunks)

    def moved(self, chunks: Iterable[Chunk], dim: int, spans: Sequence[tuple[int, int, int]]) -> Iterator[Chunk]:
        """A shard's chunks in the whole tensor; each span is (first in the shard, size, first in the tensor)."""
        for chunk in chunks:
            box = chunk.box
            first, size = box.offsets[dim], box.sizes[dim]
            for start, width, target in spans:
                low, high = max(first, start), min(first + size, start + width)
                if low >= high:
                    continue
                if high - low < size:
                    part = cut(chunk, _along(box, dim, low, high - low), self.item_bytes)
                    yield part.moved(_along(box, dim, low - start + target, high - low))
                else:
                    yield chunk if target == start else chunk.moved(_along(box, dim, low - start + target, size))

    def widths(self, fragment: Fragment, extents: Sequence[int]) -> list[tuple[int, ...]]:
        """How much of each section each rank holds, checked against what the ranks have."""
        if fragment.widths:
            return self.given_widths(fragment, extents)
        sections = self.sections(fragment, sum(extents))
        if len(sections) == 1:
            return [tuple(extents)]
        total, widths = sum(sections), []
        for size in sections:
            if any(size * extent % total for extent in extents):
                raise self.misfit(
                    f"the ranks hold {_plus(extents)}, of which no whole shares of the section of {size} follow: give "
                    "the rule's widths"
                )
            widths.append(tuple(size * extent // total for extent in extents))
        return widths

    def sections(self, fragment: Fragment, total: int) -> tuple[int, ...]:
        if not fragment.sections:
            if fragment.count < 1 or total % fragment.count:
                raise self.misfit(f"{total} elements do not make {fragment.count} equal sections")
            return (total // fragment.count,) * fragment.count
        sections = tuple(size for size in fragment.sections if isinstance(size, int))
        if len(sections) != len(fragment.sections):
            raise self.misfit("its sections have variables that the checkpoint does not say")
        if any(size < 0 for size in sections) or sum(sections) != total:
            raise self.misfit(f"its sections {_plus(sections)} are not the {total} elements that the ranks hold")
        return sections

    def given_widths(self, fragment: Fragment, extents: Sequence[int]) -> list[tuple[int, ...]]:
        widths = list(fragment.widths)
        if any(len(section) != len(extents) or any(width < 0 for width in section) for section in widths):
            raise self.misfit(f"its widths are not {len(extents)} sizes per section, one for each rank")
        held = [sum(section[rank] for section in widths) for rank in range(len(extents))]
        if held != list(extents):
            raise self.misfit(f"its widths give the ranks {_plus(held)} elements but they hold {_plus(extents)}")
        if fragment.sections or fragment.count > 1:
            sections = self.sections(fragment, sum(extents))
            if sections != tuple(map(sum, widths)):
                raise self.misfit(f"its widths add up to other sections than {_plus(sections)}")
        return widths

    # ------------------------------------------------------------ flat

    def flat(self, shards: Sequence[Shard], shape: tuple[int, ...] | None) -> tuple[tuple[int, ...], tuple[Chunk, ...]]:
        """The shards, one after the other, are the flattened tensor; more elements than that has are padding."""
        if shape is None:
            raise self.misfit("the shape of the whole tensor is not known")
        if any(len(shard.shape) != 1 for shard in shards):
            raise self.misfit("not every rank holds one dimension")
        count, base = math.prod(shape), 0
        chunks: list[Chunk] = []
        for shard in shards:
            for chunk in shard.chunks:
                start = base + chunk.box.offsets[0]
                size = min(chunk.box.sizes[0], count - start)
                if size > 0 and chunk.strides is not None:
                    raise self.misfit("a rank's flat part is not contiguous in its file")
                if size > 0:
                    chunks += unflatten(chunk, shape, start, size, self.item_bytes)
            base += shard.shape[0]
        if base < count:
            raise self.misfit(f"the ranks hold {base} elements but its shape {list(shape)} has {count}")
        return shape, tuple(chunks)

    # ------------------------------------------------------------ padding

    def without_padding(
        self,
        padded: Padding,
        shape: tuple[int, ...],
        chunks: tuple[Chunk, ...],
        others: tuple[tuple[Chunk, ...], ...],
    ) -> tuple[tuple[int, ...], tuple[Chunk, ...], tuple[tuple[Chunk, ...], ...]]:
        dim = self.dimension(padded.dim, shape)
        to = padded.to
        if not isinstance(to, int):
            raise self.misfit("its padding has a variable that the checkpoint does not say")
        if not 0 <= to <= shape[dim]:
            raise self.misfit(f"the ranks hold {shape[dim]} elements along dimension {dim}, fewer than {to}")
        span = ((0, to, 0),)
        return (
            (*shape[:dim], to, *shape[dim + 1 :]),
            tuple(self.moved(chunks, dim, span)),
            tuple(tuple(self.moved(copy, dim, span)) for copy in others),
        )


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return shape[:dim] + shape[dim + 1 :]


def _along(box: Box, dim: int, start: int, size: int) -> Box:
    """The box with another range along one dimension."""
    return Box(
        (*box.offsets[:dim], start, *box.offsets[dim + 1 :]),
        (*box.sizes[:dim], size, *box.sizes[dim + 1 :]),
    )


def _spans(widths: Sequence[tuple[int, ...]], rank: int) -> list[tuple[int, int, int]]:
    """Per section: its first element in the rank's shard, its size there, and its first element in the tensor."""
    starts = accumulate((section[rank] for section in widths), initial=0)
    firsts = accumulate(map(sum, widths), initial=0)
    return [
        (start, section[rank], first + sum(section[:rank]))
        for section, start, first in zip(widths, starts, firsts, strict=False)
    ]


def _plus(sizes: Sequence[int]) -> str:
    """`4+4+2`, shortened where there are many."""
    return "+".join(map(str, sizes[:8])) + ("+..." if len(sizes) > 8 else "")
