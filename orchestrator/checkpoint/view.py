"""The universal view: every parameter and state as one logical tensor, whatever files its chunks are in."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.layout import Box, Chunk, LogicalTensor
from orchestrator.checkpoint.reshard import Copy, plan_copies
from orchestrator.core.errors import CheckpointError

Bytes = npt.NDArray[Any]
_ITEMS: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


class UniversalView:
    """A checkpoint's tensors, state and step. Building it copies nothing; files are mapped when first read.

    Safe to read from several threads. Its memory maps live as long as it does.
    """

    def __init__(
        self,
        directory: Path,
        *,
        step: int,
        generation: int,
        state: dict[str, Any],
        tensors: dict[str, LogicalTensor],
    ) -> None:
        self.directory = directory
        self.step = step
        self.generation = generation
        self.state = state
        self.tensors = tensors
        self._maps: dict[str, mmap.mmap] = {}

    def read(self, name: str, box: Box, out: Any, *, check: bool = False) -> int:
        """Fill `out`, a writable C-contiguous buffer of the box, from exactly the box's bytes; returns their number.

        With `check`, chunks that are read whole are compared with their checksums. Raises `CheckpointError` for a
        tensor or box that is not there, `CorruptCheckpoint` for missing elements, a shortened file or a wrong checksum.
        """
        tensor = self._tensor(name, box)
        items = _ITEMS[tensor.item_bytes]
        target = memoryview(out).cast("B") if box.elements else memoryview(b"")
        if target.nbytes != box.elements * tensor.item_bytes:
            raise CheckpointError(
                f"{name} {box} has {box.elements * tensor.item_bytes} bytes but the buffer for it has {target.nbytes}: "
                "give a buffer of the box's size"
            )
        plan = plan_copies(box, tensor.chunks)
        if plan.missing:
            raise corrupt(self.directory.name, f"no chunk holds {', '.join(map(str, plan.missing[:3]))}", name)
        if not plan.copies:
            return 0
        destination = np.frombuffer(target, items).reshape(box.sizes)
        for copy in plan.copies:
            source = self._array(tensor, copy.chunk)
            if check and copy.chunk.digest is not None and copy.source.elements == copy.chunk.box.elements:
                self._check(tensor, copy, source)
            np.copyto(_part(destination, copy.destination), _part(source, copy.source))
        return target.nbytes

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

    def _check(self, tensor: LogicalTensor, copy: Copy, source: Bytes) -> None:
        if xxhash.xxh3_128_hexdigest(source.data) != copy.chunk.digest:
            reason = f"the bytes of chunk {copy.chunk.box} do not match their checksum"
            raise corrupt(self._label(copy.chunk.file), reason, tensor.name)

    def _array(self, tensor: LogicalTensor, chunk: Chunk) -> Bytes:
        """The chunk as an array over its file; nothing is read yet."""
        mapped = self._mapped(chunk.file, tensor.name)
        count = chunk.box.elements
        if chunk.begin + count * tensor.item_bytes > len(mapped):
            raise corrupt(self._label(chunk.file), f"it ends at byte {len(mapped)}", tensor.name)
        array: Bytes = np.frombuffer(mapped, _ITEMS[tensor.item_bytes], count, chunk.begin)
        return array.reshape(chunk.box.sizes)

    def _mapped(self, file: str, tensor: str) -> mmap.mmap:
        mapped = self._maps.get(file)
        if mapped is None:
            try:
                descriptor = os.open(self.directory / file, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise corrupt(self._label(file), "it is missing", tensor) from error
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint file {self.directory / file} cannot be read ({error.strerror}): make it readable"
                ) from error
            try:
                if os.fstat(descriptor).st_size == 0:
                    raise corrupt(self._label(file), "it is empty", tensor)
                mapped = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
            mapped = self._maps.setdefault(file, mapped)
        return mapped

    def _label(self, file: str) -> str:
        return f"{self.directory.name}/{file}"


def _part(array: Bytes, box: Box) -> Bytes:
    """A view of the box, also where the array is a scalar's (which a plain index would copy out)."""
    index: tuple[Any, ...] = (*box.slices, ...)
    part: Bytes = array[index]
    return part
