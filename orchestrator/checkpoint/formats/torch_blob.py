"""What `torch.save` writes for one tensor, as bytes before and after its elements: so that these can be streamed.

Without checksums, as torch writes it under `set_crc32_options(False)`: `torch.load` reads it, `weights_only` and `mmap`
included; `unzip` would complain.
"""

from __future__ import annotations

from orchestrator.checkpoint.formats.torch_archive import ALIGNMENT, Storage, archive
from orchestrator.checkpoint.formats.torch_pickle import Tensor

__all__ = ["ALIGNMENT", "tensor_blob"]


def tensor_blob(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The bytes before and after the row-major elements of a tensor."""
    laid = archive("", Tensor(0, dtype, shape), (Storage(dtype, shape, tensor=""),))
    literals, elements = laid.output.literals, laid.begins[0]
    before = b"".join(data for begin, data in literals if begin < elements)
    return before, b"".join(data for begin, data in literals if begin >= elements)
