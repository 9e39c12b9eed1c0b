"""Seconds of collectives, and how fast the slowest link of a group is.

A collective over n devices moves (n - 1) / n of its bytes over the slowest link of the group and pays log2(n) hops.
"""

from __future__ import annotations

import numpy as np

from orchestrator.planner.candidates import Floats, Ints
from orchestrator.planner.hardware import Machine

LINK = 0.75
"""Of a link's bandwidth: large collectives."""


def collective_s(size_bytes: Floats, group: Ints, bytes_per_s: Floats, latency_s: float) -> Floats:
    """Seconds of an all-gather or reduce-scatter whose full tensor has `size_bytes`."""
    hops = np.ceil(np.log2(np.maximum(group, 1)))
    return np.where(group <= 1, 0.0, (group - 1) / group * size_bytes / (LINK * bytes_per_s) + hops * latency_s)


def link(machine: Machine, span: Ints, stride: Ints | int = 1) -> Floats:
    """Bytes per second and device of a group that spans so many devices in rank order and takes every `stride`-th.

    Its members inside a domain share their network adapters: what comes in through one is handed on inside.
    """
    device = machine.device
    members = np.maximum(machine.domain // stride, 1)
    outside = np.minimum(device.node_bytes_per_s, members * device.network_bytes_per_s)
    outside = np.minimum(outside, rack_link(machine, span, stride))
    return np.where(span <= machine.domain, device.node_bytes_per_s, outside)


def rack_link(machine: Machine, span: Ints, stride: Ints | int) -> Floats | float:
    """Bytes per second and device of such a group on its way from rack to rack; infinite where it lies in one.

    All groups of the rack share what may leave it. Ranks lie rack by rack, so that of a group's members in a rack only
    the last one sends to the next rack: a ring of few groups is not slowed, a group of one member in each rack is most.
    """
    if not machine.rack:
        return np.inf
    members = np.maximum(machine.rack / stride, 1.0)
    between = members * machine.device.network_bytes_per_s / machine.oversubscription
    return np.where(span <= machine.rack, np.inf, between)
