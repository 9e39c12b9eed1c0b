"""Faults of a local run: what to break, where and when, as `--fail` and `--return` say it. Pure: no process is touched.

--fail "node-2@step=40"             the node is lost: agent and workers killed, stays away
--return "node-2@step=80"           and comes back
--fail "node-2,node-3@step=40"      two at once
--fail "worker:node-1@step=30"      one worker killed (SIGKILL)
--fail "hang:node-1@step=30"        one worker stopped (SIGSTOP)
--fail "agent:node-1@t=12.5"        the agent killed 12.5 s after the start; it is started again
--fail "controller@phase=STARTING#2"   the controller killed when STARTING is entered for the second time
"""

from __future__ import annotations

import enum
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.core.errors import InvalidInput
from orchestrator.core.status import JobStatus, Phase


class Kind(enum.StrEnum):
    """What happens."""

    NODE = "node"
    WORKER = "worker"
    AGENT = "agent"
    CONTROLLER = "controller"
    HANG = "hang"
    RETURN = "return"


@dataclass(frozen=True, slots=True)
class Trigger:
    """When it happens: exactly one of `step`, `time_s` and `phase` is set."""

    step: int | None = None
    """As soon as this many steps are complete."""
    time_s: float | None = None
    """Seconds since the start of the run."""
    phase: Phase | None = None
    entry: int = 1
    """The how-manieth entry into `phase`, counted from 1."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing to do to the cluster; `nodes` is empty for the controller."""

    kind: Kind
    nodes: tuple[str, ...]
    trigger: Trigger
    text: str
    """As the user wrote it."""


_SHAPE = 'write WHAT@WHEN, for example "node-2@step=40", "worker:node-1@t=12.5" or "controller@phase=STARTING#2"'
_FAILURES = (Kind.WORKER, Kind.AGENT, Kind.HANG)
_PHASE = re.compile(r"([A-Za-z]+)(?:#([1-9]\d*))?")


def parse(fails: Sequence[str], returns: Sequence[str], nodes: Sequence[str]) -> list[Fault]:
    """All faults of a run on `nodes`; raises `InvalidInput` for what is misspelt or can never happen."""
    faults = [_parse("--fail", text, nodes) for text in fails]
    faults += [_parse("--return", text, nodes) for text in returns]
    for node in nodes:
        _check_returns(node, [fault for fault in faults if node in fault.nodes])
    return faults


def _parse(option: str, text: str, nodes: Sequence[str]) -> Fault:
    what, at, when = text.strip().partition("@")
    if not at or not what or not when:
        raise InvalidInput(f"{option} {text!r} cannot be read: {_SHAPE}")
    trigger = _trigger(option, text, when)
    kind, names = _target(option, text, what)
    for name in names:
        if name not in nodes:
            raise InvalidInput(f"{option} {text!r} names {name!r}, but the nodes are {', '.join(nodes)}")
    return Fault(kind, names, trigger, text)


def _target(option: str, text: str, what: str) -> tuple[Kind, tuple[str, ...]]:
    if option == "--return":
        return Kind.RETURN, _names(option, text, what)
    if what == Kind.CONTROLLER:
        return Kind.CONTROLLER, ()
    kind, colon, names = what.partition(":")
    if not colon:
        return Kind.NODE, _names(option, text, what)
    if kind not in {*_FAILURES, Kind.NODE}:
        known = ", ".join([f"{one}:" for one in (Kind.NODE, *_FAILURES)] + ["controller"])
        raise InvalidInput(f"{option} {text!r} has the unknown kind {kind!r}: the kinds are {known}")
    return Kind(kind), _names(option, text, names)


def _names(option: str, text: str, names: str) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in names.split(","))
    if not all(chosen):
        raise InvalidInput(f"{option} {text!r} names no node: {_SHAPE}")
    if len(set(chosen)) < len(chosen):
        raise InvalidInput(f"{option} {text!r} names a node twice: name each once")
    return chosen


def _trigger(option: str, text: str, when: str) -> Trigger:
    key, _, value = when.partition("=")
    if key == "step" and value.isascii() and value.isdigit() and int(value) > 0:
        return Trigger(step=int(value))
    if key == "t" and (time_s := _seconds(value)) is not None:
        return Trigger(time_s=time_s)
    if key == "phase" and (match := _PHASE.fullmatch(value)) and match[1].upper() in set(Phase):
        return Trigger(phase=Phase(match[1].upper()), entry=int(match[2] or 1))
    phases = ", ".join(Phase)
    raise InvalidInput(
        f"{option} {text!r} has a WHEN that cannot be read: use step=N (N > 0), t=SECONDS or phase=NAME[#N] ({phases})"
    )


def _seconds(value: str) -> float | None:
    try:
        seconds = float(value.removesuffix("s"))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _check_returns(node: str, faults: list[Fault]) -> None:
    """A node can come back only after it was lost, and be lost again only after it came back."""
    lost = [fault for fault in faults if fault.kind is Kind.NODE]
    returns = [fault for fault in faults if fault.kind is Kind.RETURN]
    if returns and len(returns) > len(lost):
        never = "never lost" if not lost else f"lost only {len(lost)} times"
        raise InvalidInput(
            f'--return {returns[-1].text!r}: {node} is {never} by a --fail "{node}@...", so it cannot return; '
            "add that --fail or leave this --return out"
        )
    if len(lost) > len(returns) + 1:
        raise InvalidInput(
            f"--fail {lost[-1].text!r}: {node} is lost already by then; add a --return for it in between"
        )
    for key in ("step", "time_s"):
        ours = sorted(value for fault in lost if (value := getattr(fault.trigger, key)) is not None)
        theirs = sorted(value for fault in returns if (value := getattr(fault.trigger, key)) is not None)
        if len(ours) == len(lost) and len(theirs) == len(returns):
            for gone, back in zip(ours, theirs, strict=False):
                if back <= gone:
                    raise InvalidInput(f"{node} would return before it is lost: give --return a later WHEN than --fail")


@dataclass(slots=True)
class Schedule:
    """Which faults are due; each happens once, and not before the cluster can suffer it."""

    pending: list[Fault]
    entries: Counter[Phase] = field(default_factory=Counter)
    _last: tuple[Phase, int] | None = None

    def observe(self, status: JobStatus) -> None:
        """Count entries into phases; a new generation enters its phase anew."""
        last, self._last = self._last, (status.phase, status.generation)
        relaunched = status.phase in {Phase.STARTING, Phase.RUNNING} and last is not None and last != self._last
        if last is None or last[0] is not status.phase or relaunched:
            self.entries[status.phase] += 1

    def due(self, status: JobStatus | None, time_s: float) -> list[Fault]:
        """Pending faults whose trigger has come, at `time_s` seconds since the start."""
        return [fault for fault in self.pending if self._reached(fault.trigger, status, time_s)]

    def done(self, fault: Fault) -> None:
        """The fault has happened."""
        self.pending.remove(fault)

    def _reached(self, trigger: Trigger, status: JobStatus | None, time_s: float) -> bool:
        if trigger.time_s is not None:
            return time_s >= trigger.time_s
        if trigger.phase is not None:
            return self.entries[trigger.phase] >= trigger.entry
        assert trigger.step is not None
        return status is not None and status.step >= trigger.step
