"""regrow in PyTorch's own API: a reader and a writer for `torch.distributed.checkpoint`.

from orchestrator.checkpoint.formats.torch_api import NativeWriter, UniversalReader

dcp.load(state_dict, storage_reader=UniversalReader("/ckpt"))            # any source into any mesh
dcp.save(state_dict, storage_writer=NativeWriter("/ckpt", step=1000))    # a committed native checkpoint
"""

from __future__ import annotations

from orchestrator.checkpoint.formats.torch_reader import UniversalReader
from orchestrator.checkpoint.formats.torch_writer import NativeWriter

__all__ = ["NativeWriter", "UniversalReader"]
