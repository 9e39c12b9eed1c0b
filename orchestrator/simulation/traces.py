"""Capacity traces: how many nodes there were, as a step function in CSV."""

from __future__ import annotations

import csv
from random import Random

from orchestrator.core.errors import InvalidInput
from orchestrator.simulation.failures import Kind, Outage

COLUMNS = ("available_nodes", "available_gpus", "nodes_after")
"""Any one of these beside `t_s` says how much there is from then on."""


def parse_trace(text: str, name: str, devices_per_node: int = 1) -> list[tuple[float, int]]:
    """(seconds, nodes from then on), by time; raises `InvalidInput` naming `name` and line.

    `available_gpus` are taken as whole nodes of `devices_per_node`.
    """
    try:
        records = list(csv.DictReader(text.splitlines(), strict=True))
    except csv.Error as error:
        raise InvalidInput(f"{name} is not CSV ({error}): give a table with a header line") from error
    column = next((one for one in COLUMNS if records and one in records[0]), None)
    if column is None or "t_s" not in records[0]:
        raise InvalidInput(f"{name} has no columns t_s and one of {', '.join(COLUMNS)}: give a header line with them")
    steps: list[tuple[float, int]] = []
    for line, record in enumerate(records, start=2):
        at, count = _number(record["t_s"], name, line, "t_s"), _number(record[column], name, line, column)
        if steps and at < steps[-1][0]:
            raise InvalidInput(f"{name}, line {line}: t_s {at:g} is before {steps[-1][0]:g}: sort the lines by time")
        nodes = int(count) // devices_per_node if column == "available_gpus" else int(count)
        steps.append((at, nodes))
    return steps


def _number(text: str | None, name: str, line: int, column: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e12:
        raise InvalidInput(
            f"{name}, line {line}: {column} is {(text or '')[:40]!r}, no number of at least 0: correct it"
        )
    return value


def outages(steps: list[tuple[float, int]], nodes: int, seconds: float, seed: int) -> tuple[Outage, ...]:
    """Who is away when, so that of `nodes` nodes as many are there as the trace says (or all, where it says more).

    A trace does not tell who leaves: that is drawn.
    """
    random = Random(f"{seed} trace")
    here, gone_since = list(range(nodes)), dict[int, float]()
    found: list[Outage] = []
    for at, count in [(max(0.0, at), min(count, nodes)) for at, count in steps if at < seconds]:
        while len(here) > count:
            node = here.pop(random.randrange(len(here)))
            gone_since[node] = at
        while len(here) < count:
            node = random.choice(sorted(gone_since))
            found.append(Outage(gone_since.pop(node), at, (node,), Kind.NODE))
            here.append(node)
    found += [Outage(since, seconds + 1, (node,), Kind.NODE) for node, since in gone_since.items()]
    return tuple(sorted((one for one in found if one.end_s > one.start_s), key=lambda one: (one.start_s, one.nodes)))
