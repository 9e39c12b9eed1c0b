"""Small orders and directives for the agent's unit tests."""

from __future__ import annotations

from orchestrator.core.types import (
    AssignedNode,
    Assignment,
    BatchSplit,
    Directive,
    Entrypoint,
    Generation,
    LaunchOrder,
    Mesh,
    Plan,
)


def order(
    generation: int, nodes: tuple[str, ...] = ("a", "b"), *, devices: int = 1, store: str | None = None
) -> LaunchOrder:
    """Each node with `devices` ranks."""
    world = devices * len(nodes)
    parts = tuple(AssignedNode(node, index * devices, devices) for index, node in enumerate(nodes))
    plan = Plan(Mesh(dp_shard=world), BatchSplit(world, 1, 1, (1,) * world))
    return LaunchOrder(
        "job", Generation(generation, plan, Assignment(parts)), Entrypoint("train.py"), "", None, None, None, store
    )


def directive(
    generation: int, launch: LaunchOrder | None = None, *, save_request: int = 0, pause: bool = False
) -> Directive:
    return Directive(generation, launch, save_request=save_request, pause=pause)
