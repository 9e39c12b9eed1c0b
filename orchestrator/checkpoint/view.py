"""The universal view: every parameter and state as one logical tensor, whatever files its chunks are in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import xxhash

from orchestrator.checkpoint.archive import StoredTensor, open_blob
from orchestrator.checkpoint.fields import corrupt, naming
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.layout import Box, Chunk, LogicalTensor, is_row_major, row_major
from orchestrator.checkpoint.numbers import FLOATS, ITEMS, items, numbers
from orchestrator.checkpoint.reshard import Copy, plan_copies
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint

Bytes: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
_LONGEST_HEADER_BYTES = 1 << 16


class UniversalView:
    """A checkpoint's tensors, state and step. Building it copies nothing; files are opened when first read.

    Safe to read from several threads.
    """

    def __init__(
        self,
        files: Files,
        *,
        step: int,
        generation: int,
        state: dict[str, Any],
        tensors: dict[str, LogicalTensor],
        source: str = "native",
        aliases: Mapping[str, str] | None = None,
        frozen: Iterable[str] = (),
        training_dtypes: Mapping[str, str] | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        self.files = files
        self.step = step
        """Optimizer steps taken; 0 where the source does not say."""
        self.generation = generation
        """The generation that wrote it; 0 for formats without."""
        self.state = state
        """JSON-able scalar state; `param_groups` lists the hyper-parameters of each group with its parameters' names
        under `params`."""
        self.tensors = tensors
        """By name (`P` or `P.<state>`). A parameter's value is the fp32 master where there is one."""
        self.source = source
        """The format, in words: `native`, `deepspeed zero 3`, `dcp`, ..."""
        self.aliases = dict(aliases or {})
        """Tied name -> the name stored in `tensors`; aliases are not in `tensors`."""
        self.frozen = frozenset(frozen)
        """Parameters that are not trained (values only)."""
        self.training_dtypes = dict(training_dtypes or {})
        """Parameter -> dtype of the weights that it was trained with, where another than its tensor's."""
        self.notes = tuple(notes)
        """What a reader should know: how the source was read, what it does not hold. Whole sentences."""
        self._opened: dict[tuple[str, int], StoredTensor] = {}
        self._alike: dict[int, tuple[bytes, StoredTensor]] = {}

    def read(self, name: str, box: Box, out: Any, *, check: bool = False) -> int:
        """Fill `out`, a writable C-contiguous buffer of the box, from exactly the box's bytes; returns their number.

        With `check`, chunks that are read whole are compared with their checksums. Raises `CheckpointError` for a
        tensor or box that is not there, `CorruptCheckpoint` for missing elements, a shortened file or a wrong checksum.
        """
        tensor = self._tensor(name, box)
        target = memoryview(out).cast("B") if box.elements else memoryview(b"")
        if target.nbytes != box.elements * tensor.item_bytes:
            raise CheckpointError(
                f"{name} {box} has {box.elements * tensor.item_bytes} bytes but the buffer for it has {target.nbytes}: "
                "give a buffer of the box's size"
            )
        if not box.elements:
            return 0
        destination = np.frombuffer(target, ITEMS[tensor.item_bytes]).reshape(box.sizes)
        self._fill(tensor, tensor.chunks, box, destination, check)
        if tensor.average and tensor.others:
            self._average(tensor, box, destination, check)
        return target.nbytes

    def runs(self, name: str, box: Box) -> list[tuple[str, int, int]] | None:
        """(File, first byte, bytes) of the pieces that hold the box one after the other, in its row-major order; they
        can be copied without looking at elements. None where they must be rearranged or averaged, or are in no file.

        Raises as `read` does.
        """
        tensor = self._tensor(name, box)
        if tensor.average and tensor.others:
            return None
        found = []
        for copy in self._plan(tensor, tensor.chunks, box):
            chunk = copy.chunk
            start = _position(copy.destination, box.sizes)
            if start is None or chunk.data is not None:
                return None
            try:
                chunk = self._resolved(tensor, chunk) if chunk.blob_bytes is not None else chunk
            except CorruptCheckpoint as error:
                raise naming(error, name) from error
            strides = row_major(chunk.box.sizes) if chunk.strides is None else chunk.strides
            if not is_row_major(copy.source.sizes, strides):
                return None
            begin = chunk.begin + _skipped(copy.source, strides) * tensor.item_bytes
            found.append((start, chunk.file, begin, copy.source.elements * tensor.item_bytes))
        runs: list[tuple[str, int, int]] = []
        for _, file, begin, count in sorted(found):
            if runs and runs[-1][0] == file and runs[-1][1] + runs[-1][2] == begin:
                runs[-1] = (file, runs[-1][1], runs[-1][2] + count)
            else:
                runs.append((file, begin, count))
        return runs

    def read_replica(self, name: str, index: int, box: Box, out: Any) -> None:
        """Fill `out` from one copy alone: the `index`-th of the tensor's `others`, or with -1 the first copy, which the
        mean of an average hides; raises as `read` does.
        """
        tensor = self._tensor(name, box)
        if box.elements:
            destination = np.frombuffer(memoryview(out).cast("B"), ITEMS[tensor.item_bytes]).reshape(box.sizes)
            self._fill(tensor, tensor.chunks if index < 0 else tensor.others[index], box, destination, check=False)

    def _tensor(self, name: str, box: Box) -> LogicalTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"the checkpoint of step {self.step} has no {name}: it was made by another model")
        if not box.inside(tensor.shape):
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)} in the checkpoint of step {self.step}, which does not hold "
                f"offsets {list(box.offsets)} with sizes {list(box.sizes)}: it was made by another model"
            )
        return tensor

    def _fill(self, tensor: LogicalTensor, chunks: Iterable[Chunk], box: Box, destination: Bytes, check: bool) -> None:
        for copy in self._plan(tensor, chunks, box):
            try:
                self._copy(tensor, copy, _part(destination, copy.destination), check)
            except CorruptCheckpoint as error:
                raise naming(error, tensor.name) from error

    def _plan(self, tensor: LogicalTensor, chunks: Iterable[Chunk], box: Box) -> tuple[Copy, ...]:
        plan = plan_copies(box, chunks)
        if plan.missing:
            reason = f"no chunk holds {', '.join(map(str, plan.missing[:3]))}"
            raise corrupt(self.files.location, reason, tensor.name)
        return plan.copies

    def _copy(self, tensor: LogicalTensor, copy: Copy, target: Bytes, check: bool) -> None:
        chunk = copy.chunk
        if chunk.blob_bytes is not None:
            chunk = self._resolved(tensor, chunk)
        strides = row_major(chunk.box.sizes) if chunk.strides is None else chunk.strides
        begin = chunk.begin + _skipped(copy.source, strides) * tensor.item_bytes
        if chunk.data is not None:
            count = copy.source.elements
            np.copyto(target, np.frombuffer(chunk.data, ITEMS[tensor.item_bytes], count, begin).reshape(target.shape))
        elif not is_row_major(copy.source.sizes, strides):
            np.copyto(target, self._strided(tensor, chunk, begin, copy.source.sizes, strides))
        elif target.flags.c_contiguous:
            self.files.read_into(chunk.file, begin, _bytes(target))
            self._check(tensor, copy, target, check)
        else:
            staged = np.empty(target.shape, target.dtype)
            self.files.read_into(chunk.file, begin, _bytes(staged))
            self._check(tensor, copy, staged, check)
            np.copyto(target, staged)

    def _check(self, tensor: LogicalTensor, copy: Copy, data: Bytes, check: bool) -> None:
        chunk = copy.chunk
        if check and chunk.digest is not None and copy.source.elements == chunk.box.elements:  # noqa: SIM102
            if xxhash.xxh3_128_hexdigest(_bytes(data)) != chunk.digest:
                reason = f"the bytes of chunk {chunk.box} do not match their checksum"
                raise corrupt(self.files.label(chunk.file), reason, tensor.name)

    def _strided(
        self, tensor: LogicalTensor, chunk: Chunk, begin: int, sizes: tuple[int, ...], strides: tuple[int, ...]
    ) -> Bytes:
        """The elements as an array over the file, whatever lies between them."""
        reach = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        item = tensor.item_bytes
        flat = np.frombuffer(self.files.span(chunk.file, begin, reach * item), ITEMS[item])
        steps = tuple(stride * item for stride in strides)
        return np.lib.stride_tricks.as_strided(flat, sizes, steps, writeable=False)

    def _open(self, tensor: LogicalTensor, chunk: Chunk) -> StoredTensor:
        """The tensor in its blob. Archives of tensors of one shape differ in their elements only: one is parsed."""
        assert chunk.blob_bytes is not None
        before, alike = self._alike.get(chunk.blob_bytes, (b"", None))
        expected = chunk.box.sizes if chunk.blob_shape is None else chunk.blob_shape
        if alike is not None and (alike.dtype, alike.shape) == (tensor.dtype, expected):  # noqa: SIM102
            if self.files.span(chunk.file, chunk.begin, len(before)) == before:
                return replace(alike, file=chunk.file, begin=chunk.begin + len(before))
        stored = open_blob(self.files, chunk.file, chunk.begin, chunk.blob_bytes)
        length = stored.begin - chunk.begin
        if length <= _LONGEST_HEADER_BYTES:
            before = bytes(self.files.span(chunk.file, chunk.begin, length))
            if b"data.pkl" in before:  # what tells dtype, shape and strides lies before the elements
                self._alike[chunk.blob_bytes] = before, stored
        return stored

    def _resolved(self, tensor: LogicalTensor, chunk: Chunk) -> Chunk:
        """The chunk inside its serialised tensor, which is opened once."""
        key = (chunk.file, chunk.begin)
        stored = self._opened.get(key)
        if stored is None:
            stored = self._opened[key] = self._open(tensor, chunk)
        expected = chunk.box.sizes if chunk.blob_shape is None else chunk.blob_shape
        if stored.dtype != tensor.dtype or stored.shape != expected:
            raise corrupt(
                self.files.label(chunk.file),
                f"at byte {chunk.begin} it holds {stored.dtype} {list(stored.shape)} where {tensor.dtype} "
                f"{list(expected)} is expected",
                tensor.name,
            )
        begin, strides = stored.begin, stored.strides
        if chunk.blob_shape is not None:
            if strides is not None:
                reason = (
                    f"at byte {chunk.begin} it holds a tensor with its dimensions exchanged, of which parts are wanted"
                )
                raise corrupt(self.files.label(chunk.file), reason, tensor.name)
            begin, strides = begin + chunk.blob_skip * tensor.item_bytes, chunk.strides
        return replace(chunk, begin=begin, strides=strides, blob_bytes=None, blob_shape=None)

    def _average(self, tensor: LogicalTensor, box: Box, destination: Bytes, check: bool) -> None:
        """The mean of all copies, in the order in which they are listed, rounded once per addition in fp32 or wider."""
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{tensor.name} of dtype {tensor.dtype} has no mean: name it as replicated in the rules"
            )
        total = numbers(destination, tensor.dtype)
        if tensor.dtype == "F16":
            total = total.astype(np.float32)
        for chunks in tensor.others:
            one = np.empty_like(destination)
            self._fill(tensor, chunks, box, one, check)
            total = total + numbers(one, tensor.dtype)
        mean = total / total.dtype.type(1 + len(tensor.others))
        np.copyto(destination, items(mean, tensor.dtype).view(destination.dtype).reshape(destination.shape))


def _skipped(source: Box, strides: Sequence[int]) -> int:
    """Elements before the box's first."""
    return sum(offset * stride for offset, stride in zip(source.offsets, strides, strict=True))


def _position(part: Box, sizes: tuple[int, ...]) -> int | None:
    """Elements before `part` in the row-major order of a box of these sizes; None where others lie within it."""
    strides = row_major(sizes)
    return _skipped(part, strides) if is_row_major(part.sizes, strides) else None


def _part(array: Bytes, box: Box) -> Bytes:
    """A view of the box, also where the array is a scalar's (which a plain index would copy out)."""
    index: tuple[Any, ...] = (*box.slices, ...)
    part: Bytes = array[index]
    return part


def _bytes(array: Bytes) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8).data)
