"""Peak memory per device, in bytes, from the shapes alone.

States: 16 bytes per parameter (fp32 master, gradient and the two moments of Adam; Rajbhandari et al. 2020,
arXiv:1910.02054), divided over `dp_shard`. Gathered parameters: two layers without a pipeline, the whole stage with
one (it is not gathered again for every micro-batch). Activations: 34 bytes per token and hidden unit of a layer in
bf16 with fused attention, 2 for its input alone under full recomputation (Korthikanti et al. 2022, arXiv:2205.05198),
divided over `tp` by sequence parallelism. A pipeline is taken to run 1F1B: its first stage keeps as many micro-batches
as there are stages, its last keeps one. (GPipe would keep all.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from orchestrator.core.spec import ModelSpec
from orchestrator.core.types import Mesh, Recomputation
from orchestrator.planner.hardware import Device
from orchestrator.planner.transformer import layer_parameters, split_layers, vocabulary_parameters

USABLE = 0.9
"""Share of a device's memory that a plan may fill: the rest is for the allocator, buffers and the model's error."""

_STATE_BYTES = 16
_LOGIT_BYTES = 8
"""Logits and their gradient in fp32, beside the copy in the working type."""
_ACTIVATION_BYTES = {Recomputation.NONE: 34, Recomputation.SELECTIVE: 20, Recomputation.FULL: 2}


@dataclass(frozen=True, slots=True)
class _End:
    """The first or the last pipeline stage before `tp` and `dp_shard` divide it."""

    layers: int
    parameters: int
    gathered: int
    """Parameters that lie gathered at one time."""
    logits: int
    """Numbers of the output per token; 0 where the stage has none."""


@cache
def _ends(model: ModelSpec, stages: int) -> tuple[_End, ...]:
    layers = split_layers(model.layers, stages)
    one, table = layer_parameters(model), vocabulary_parameters(model)
    if stages == 1:
        parameters = layers[0] * one + table * (1 if model.tied_embeddings else 2)
        return (_End(layers[0], parameters, min(parameters, 2 * max(one, table)), model.vocab),)
    first, last = layers[0] * one + table, layers[-1] * one + table
    return _End(layers[0], first, first, 0), _End(layers[-1], last, last, model.vocab)


def peak_bytes(
    model: ModelSpec,
    device: Device,
    mesh: Mesh,
    micro_batch: int,
    micro_batches: int,
    recomputation: Recomputation,
) -> int:
    """Estimated peak on the fullest device: the larger of the first stage (embedding) and the last (logits)."""
    tokens = micro_batch * model.seq_length
    wide = device.number_bytes
    state_bytes = _STATE_BYTES / mesh.dp_shard
    # A lone fp32 shard is used where it lies; anything else is gathered, or cast to bf16.
    copy_bytes = wide if mesh.dp_shard > 1 or wide < 4 else 0
    kept = _ACTIVATION_BYTES[recomputation]
    working = 0 if recomputation is Recomputation.NONE else _ACTIVATION_BYTES[Recomputation.NONE]
    unit = tokens * model.hidden * wide / 2
    peak = max(
        state_bytes * end.parameters
        + copy_bytes * end.gathered
        + (kept * end.layers * (1 if end.logits else min(micro_batches, mesh.pp)) + working) * unit
        + (_LOGIT_BYTES + wide) * tokens * end.logits
        for end in _ends(model, mesh.pp)
    )
    return int(peak / mesh.tp)
