"""Peak memory per device, in bytes, from the shapes alone.

States: 16 bytes per parameter (fp32 master, gradient and the two moments of Adam; Rajbhandari et al. 2020,
arXiv:1910.02054), divided over `dp_shard`. Gathered parameters: two layers without a pipeline, the whole stage with
one (it is not gathered again for every micro-batch). Activations: 34 bytes per token and hidden unit of a layer in
bf16 with fused attention, 2 for its input alone under full recomputation (Korthikanti et al. 2022, arXiv:2205.05198),
divided over `tp` by sequence parallelism. Every micro-batch of a pipeline is taken as in flight (GPipe): a 1F1B
schedule needs less.
"""

from __future__ import annotations

from orchestrator.core.spec import ModelSpec
from orchestrator.core.types import Mesh, Recomputation
from orchestrator.planner.hardware import Device
from orchestrator.planner.transformer import layer_parameters, split_layers, vocabulary_parameters

USABLE = 0.9
"""Share of a device's memory that a plan may fill: the rest is for the allocator, buffers and the model's error."""

_ACTIVATION_BYTES = {Recomputation.NONE: 34, Recomputation.SELECTIVE: 20, Recomputation.FULL: 2}


def peak_bytes(
    model: ModelSpec,
    device: Device,
    mesh: Mesh,
    micro_batch: int,
    micro_batches: int,
    recomputation: Recomputation,
) -> int:
    """Estimated peak on the fullest device: the larger of the first stage (embedding) and the last (logits)."""
    stages, tp, dp_shard = mesh.pp, mesh.tp, mesh.dp_shard
    layers = split_layers(model.layers, stages)
    tokens = micro_batch * model.seq_length
    wide = device.number_bytes
    in_flight = micro_batches if stages > 1 else 1
    unit = tokens * model.hidden * wide / 2 / tp

    def stage(held: int, vocabularies: int, last: bool) -> float:
        weights = held * layer_parameters(model) + vocabularies * vocabulary_parameters(model)
        gathered = (
            weights if stages > 1 else min(weights, 2 * max(layer_parameters(model), vocabulary_parameters(model)))
        )
        kept = held * _ACTIVATION_BYTES[recomputation] * unit * in_flight
        working = _ACTIVATION_BYTES[Recomputation.NONE] * unit if recomputation is not Recomputation.NONE else 0.0
        logits = tokens * model.vocab * (8 + wide) / tp if last else 0.0
        sharded_copy = wide * gathered / tp if dp_shard > 1 or wide < 4 else 0.0
        return 16 * weights / tp / dp_shard + sharded_copy + kept + working + logits

    if stages == 1:
        return int(stage(layers[0], 1 if model.tied_embeddings else 2, last=True))
    return int(max(stage(layers[0], 1, last=False), stage(layers[-1], 1, last=True)))
