"""PURE: what to do about a directive, given the launch that this node runs or ran last.

Level-based: the same directive over the same launch gives the same actions, and carrying them out leaves nothing to do.
One action at a time where they depend on each other: a launch is stopped first, and the next look starts the new one.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.types import Directive, LaunchOrder


@dataclass(frozen=True, slots=True)
class CurrentLaunch:
    """The launch of this node as far as the decision needs it."""

    generation: int
    ended: bool
    endpoint_known: bool
    """True where the store's endpoint needs not be told any more."""
    save_request: int
    """Highest save request of the controller that was passed on."""
    pausing: bool


@dataclass(frozen=True, slots=True)
class Start:
    """Launch this order."""

    order: LaunchOrder


@dataclass(frozen=True, slots=True)
class Stop:
    """Kill the launch; `reason` in words."""

    reason: str


@dataclass(frozen=True, slots=True)
class TellEndpoint:
    """Pass the store's endpoint on to the waiting rendezvous."""

    endpoint: str


@dataclass(frozen=True, slots=True)
class AskSave:
    """Have the workers save, and exit afterwards when `pause`."""

    request: int
    pause: bool


Action = Start | Stop | TellEndpoint | AskSave


def reconcile(current: CurrentLaunch | None, directive: Directive, node: str, newest: int) -> tuple[Action, ...]:
    """Actions that bring `node` to what `directive` says; `newest` is the highest generation ever heard of.

    Fencing: a directive from before `newest` is ignored altogether, so that neither an old controller nor a late
    message can start, stop or pause anything.
    """
    if directive.generation < newest:
        return ()
    order = _wanted(directive, node)
    running = current is not None and not current.ended
    if order is None:
        return (Stop("nothing is to run on this node"),) if running else ()
    number = order.generation.number
    if current is None or current.generation != number:
        if not running:
            return (Start(order),)
        return (Stop(f"generation {number} replaces it"),)
    return _continue(current, order, directive) if running else ()


def _wanted(directive: Directive, node: str) -> LaunchOrder | None:
    """The order that may run here: of the newest generation, and with a part for this node."""
    order = directive.launch
    if order is None or order.generation.number != directive.generation or order.generation.assignment.of(node) is None:
        return None
    return order


def _continue(current: CurrentLaunch, order: LaunchOrder, directive: Directive) -> tuple[Action, ...]:
    actions: list[Action] = []
    if order.store is not None and not current.endpoint_known:
        actions.append(TellEndpoint(order.store))
    if directive.save_request > current.save_request or (directive.pause and not current.pausing):
        actions.append(AskSave(max(directive.save_request, current.save_request), directive.pause or current.pausing))
    return tuple(actions)
