"""Jobs and nodes that planner tests speak of."""

from __future__ import annotations

from typing import Any

from orchestrator.core.spec import AxisBounds, CheckpointSpec, JobSpec, ModelSpec
from orchestrator.core.types import Entrypoint, NodeCapacity
from orchestrator.planner import Infeasible, Planned, plan

EXAMPLE = ModelSpec(layers=8, hidden=256, heads=8, kv_heads=4, ffn_hidden=688, vocab=256, seq_length=128)
LLAMA_8B = ModelSpec(32, 4096, 32, 8, 14336, 128256, 8192)
LLAMA_70B = ModelSpec(80, 8192, 64, 8, 28672, 128256, 8192)
LLAMA_405B = ModelSpec(126, 16384, 128, 8, 53248, 128256, 8192)


def job(model: ModelSpec | None = EXAMPLE, **changes: Any) -> JobSpec:
    """The example's job; axes are given as `tp=AxisBounds(...)` or `tp=2`."""
    axes = {}
    for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"):
        if axis in changes:
            given = changes.pop(axis)
            axes[axis] = AxisBounds(given, given) if isinstance(given, int) else given
    defaults: dict[str, Any] = {"global_batch": 48, "min_nodes": 1, "max_nodes": 4096}
    return JobSpec(
        name="gpt",
        entrypoint=Entrypoint("train.py"),
        checkpoint=CheckpointSpec("/checkpoints"),
        model=model,
        parallelism=axes,
        **(defaults | changes),
    )


def nodes(
    number: int, devices: int = 1, kind: str = "cpu", memory_bytes: int = 0, first: int = 1
) -> list[NodeCapacity]:
    return [NodeCapacity(f"node-{index}", devices, memory_bytes, kind) for index in range(first, first + number)]


def planned(*args: Any, **kwargs: Any) -> Planned:
    answer = plan(*args, **kwargs)
    assert isinstance(answer, Planned), answer
    return answer


def infeasible(*args: Any, **kwargs: Any) -> Infeasible:
    answer = plan(*args, **kwargs)
    assert isinstance(answer, Infeasible), answer
    return answer
