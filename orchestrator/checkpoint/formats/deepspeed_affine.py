"""`affine_map` of `universal_checkpoint_info`: where each block of a tensor-parallel shard lies in the whole tensor.

Newer DeepSpeed (0.19.8's AutoTP) writes it beside the lists of name patterns, and before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from orchestrator.checkpoint.expressions import compiled
from orchestrator.checkpoint.formats.deepspeed_flat import Held, Shape
from orchestrator.checkpoint.formats.pickled_values import Node, short
from orchestrator.checkpoint.language import cut
from orchestrator.checkpoint.layout import ITEM_BYTES, Box, Chunk, LogicalTensor, row_major, tensor_name
from orchestrator.checkpoint.reshard import flaw, intersect

VERSION = 1
"""Of the map's own format; a later one may mean other things by the same fields."""


@dataclass(frozen=True, slots=True)
class Block:
    """`source`, a box of the whole tensor, is `target` of a rank's shard."""

    source: Box
    target: Box
    first: bool
    """Whether this is the first of the ranks that hold it."""


@dataclass(frozen=True, slots=True)
class AffineMap:
    """Where one parameter's shards lie."""

    node: Node
    shape: Shape
    shards: tuple[Shape, ...]
    blocks: tuple[tuple[Block, ...], ...]
    """Per rank."""
    rows: int | None = None
    """Rows beyond are padding and left out."""

    def merge(self, name: str, state: str | None, kind: str, pieces: Sequence[Held]) -> LogicalTensor:
        """The whole tensor from the ranks' shards; raises `CorruptCheckpoint` when they do not fit."""
        full = tensor_name(name, state)
        dtype = pieces[0].dtype
        chunks: list[Chunk] = []
        for rank, piece in enumerate(pieces):
            if piece.shape != self.shards[rank]:
                raise self.node.fail(f"has shards of {list(self.shards[rank])}, not {list(piece.shape)}", full)
            for block in self.blocks[rank]:
                if block.first:
                    chunks += _moved(piece.chunks, block, ITEM_BYTES[dtype])
        reason = flaw(self.shape, [chunk.box for chunk in chunks])
        if reason is not None:
            raise self.node.fail(f"does not tile the tensor ({reason})", full)
        shape = self.shape
        if self.rows is not None:
            shape = (self.rows, *shape[1:])
            kept = Block(Box.whole(shape), Box.whole(shape), first=True)
            chunks = _moved(chunks, kept, ITEM_BYTES[dtype])
        rule = "blocks of a geometric map"
        return LogicalTensor(full, name, state, kind, dtype, shape, tuple(chunks), rule=rule)


def _moved(chunks: Sequence[Chunk], block: Block, item_bytes: int) -> list[Chunk]:
    found = []
    for chunk in chunks:
        shared = intersect(chunk.box, block.target)
        if shared is not None:
            place = shared.relative_to(block.target.offsets).shifted(block.source.offsets)
            found.append(cut(chunk, shared, item_bytes).moved(place))
    return found


def affine_maps(info: Node | None) -> Node | None:
    """The maps by name pattern; None when there are none."""
    found = None if info is None else info.find("affine_map")
    if found is None:
        return None
    version = found.find("version")
    if version is not None and version.count() > VERSION:
        raise version.fail(f"is {version.count()}, later than {VERSION}, the last that is read")
    return found.find("params")


def affine_map(maps: Node | None, name: str, ranks: int) -> AffineMap | None:
    """The map of a parameter, by the one pattern that matches its name."""
    matching = [] if maps is None else [node for pattern, node in maps.named() if compiled(pattern).match(name)]
    if len(matching) > 1:
        raise matching[0].fail("and another map both match it", name)
    return _parsed(matching[0], name, ranks) if matching else None


def _parsed(node: Node, name: str, ranks: int) -> AffineMap:
    shape = node.at("logical_shape").shape(name)
    members = node.at("ranks").mapping()
    entries = {str(key): node.at("ranks").at(key) for key in members}
    shards, blocks = [], []
    for rank in range(ranks):
        if str(rank) not in entries:
            raise node.fail(f"lacks tensor-parallel rank {rank}", name)
        entry = entries[str(rank)]
        shard = entry.at("shard_shape").shape(name)
        found = tuple(_block(piece, name, shape, shard, rank) for piece in entry.at("pieces").items())
        if sum(block.target.elements for block in found) != prod(shard):
            raise entry.fail("has pieces of other elements than its shard", name)
        shards.append(shard)
        blocks.append(found)
    return AffineMap(node, shape, tuple(shards), tuple(blocks))


def _block(piece: Node, name: str, shape: Shape, shard: Shape, rank: int) -> Block:
    scale = piece.find("scale")
    if scale is not None and scale.value != 1:
        raise scale.fail(f"is {short(scale.value)}: tensors that are scaled on some ranks are not read", name)
    sizes = piece.at("shape").shape(name)
    source, target = _box(piece.at("source"), name, sizes, shape), _box(piece.at("dest"), name, sizes, shard)
    locations = [one.count() for one in piece.at("locations").items()]
    if rank not in locations:
        raise piece.fail(f"is not on rank {rank}, which lists it", name)
    return Block(source, target, rank == min(locations))


def _box(node: Node, name: str, sizes: Shape, shape: Shape) -> Box:
    """A strided view as a box of a row-major tensor of this shape."""
    members = node.items()
    if len(members) != 2:
        raise node.fail(f"is {short(node.value)} where offset and strides are expected", name)
    left, strides = members[0].count(), members[1].shape(name)
    offsets = []
    for stride in row_major(shape):
        offsets.append(left // stride if stride else 0)
        left -= offsets[-1] * stride
    box = Box(tuple(offsets), sizes)
    plain = len(sizes) == len(strides) == len(shape) and all(
        size <= 1 or one == other for size, one, other in zip(sizes, strides, row_major(shape), strict=True)
    )
    if not plain or left or not box.inside(shape):
        raise node.fail(f"is no box of {list(shape)}: such pieces are not read", name)
    return box
