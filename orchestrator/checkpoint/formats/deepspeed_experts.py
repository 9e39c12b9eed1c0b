"""Experts of DeepSpeed's mixture-of-experts layers, which ranks hold in parts and save in files of their own.

Every rank of an expert-parallel group (a team's, below) calls its experts 0, 1, ...; the files name them by their
numbers in the whole layer. Under ZeRO 1 and 2 a group of experts' parameters is cut over the ranks that hold the same
experts alone; without ZeRO each of the experts' owners saves its whole optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.formats.deepspeed_flat import Shape
from orchestrator.checkpoint.formats.deepspeed_module import Module
from orchestrator.checkpoint.formats.pickled_values import Node
from orchestrator.core.errors import CheckpointError

_NAME = re.compile(r"(?P<layer>(?:.*\.)?)experts\.deepspeed_experts\.(?P<expert>\d{1,9})(?P<rest>\..*)")
_BEFORE = "use_data_before_expert_parallelism"


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks that a parameter group is cut over, and what its parameters are called in the whole model."""

    ranks: Sequence[Node]
    name: Callable[[str], str]


@dataclass(slots=True)
class Experts:
    """The experts of one model-parallel rank's layers."""

    values: dict[str, Node] = field(default_factory=dict)
    """Name in the whole model -> weight."""
    counts: dict[str, int] = field(default_factory=dict)
    """What a layer's names begin with -> number of its experts."""
    teams_consecutive: bool = False
    """Whether ranks with the same experts are neighbours, and not those with different ones."""

    def teams(self, ranks: Sequence[Node], index: int, shapes: dict[str, Shape]) -> list[Team]:
        """Whom the group is cut over: all ranks, or for experts each team of those that have the same ones."""
        counts = ranks[0].find("partition_count")
        part = len(ranks)
        if self.counts and counts is not None and isinstance(counts.value, list | tuple):
            part = counts.at(index).count()
        if part in (0, len(ranks)) or len(ranks) % part or not all(_NAME.fullmatch(name) for name in shapes):
            return [Team(ranks, lambda name: name)]
        number = len(ranks) // part
        return [
            Team(
                ranks[team * part : (team + 1) * part] if self.teams_consecutive else ranks[team::number],
                self._naming(ranks[0], team, number),
            )
            for team in range(number)
        ]

    def _naming(self, rank: Node, team: int, teams: int) -> Callable[[str], str]:
        def name(local: str) -> str:
            match = _NAME.fullmatch(local)
            count = 0 if match is None else self.counts.get(match["layer"], 0)
            if match is None or not count or count % teams or int(match["expert"]) >= count // teams:
                raise rank.fail(f"is of experts that {teams} teams of ranks cannot share: {count} have files", local)
            whole = team * (count // teams) + int(match["expert"])
            return f"{match['layer']}experts.deepspeed_experts.{whole}{match['rest']}"

        return name

    def put_into(self, module: Module) -> None:
        """Add the weights where the model has them: behind the gate of their layer."""
        left = dict(self.counts)
        ordered: dict[str, Node] = {}
        names = list(module.values)
        for index, name in enumerate(names):
            ordered[name] = module.values[name]
            following = names[index + 1] if index + 1 < len(names) else ""
            for layer in [one for one in left if _is_gate(one, name) and not _is_gate(one, following)]:
                del left[layer]
                ordered |= self._of_layer(layer)
        for layer in left:
            ordered |= self._of_layer(layer)
        module.values = ordered

    def _of_layer(self, layer: str) -> dict[str, Node]:
        return {name: node for name, node in self.values.items() if _NAME.fullmatch(name)["layer"] == layer}  # type: ignore[index]

    def parts(self, module: Module, owners: int, fits: Callable[[Module], bool]) -> list[Module]:
        """What each owner of experts has of the module; `fits` says whether its optimizer can be of the first part.

        There are as many owners as the layer with most teams has teams; where all layers have fewer, several owners
        have the same experts.
        """
        teams = [number for number in range(owners, 0, -1) if owners % number == 0]
        ways = [[self._part(module, owner, owners, number) for owner in range(owners)] for number in teams]
        return next((parts for parts in ways if fits(parts[0])), ways[0])

    def _part(self, module: Module, owner: int, owners: int, teams: int) -> Module:
        team = owner * teams // owners if self.teams_consecutive else owner % teams
        kept = {name: node for name, node in module.values.items() if self._is_held(name, team, teams)}
        return Module(kept, module.buffers)

    def _is_held(self, name: str, team: int, teams: int) -> bool:
        match = _NAME.fullmatch(name) if name in self.values else None
        if match is None:
            return True
        share = -(-self.counts[match["layer"]] // teams)
        return int(match["expert"]) // share == team


def is_of_expert(name: str) -> bool:
    """Whether a parameter with this name is an expert's."""
    return _NAME.fullmatch(name) is not None


def _is_gate(layer: str, name: str) -> bool:
    return name.startswith(layer + "gate.")


def read_experts(model: Node, files: Iterable[Node]) -> Experts:
    """The experts in these files, of which `model` is the model file."""
    layers, files = model.find("ds_autoep_layers"), list(files)
    if files and layers is not None and layers.value:
        raise CheckpointError(
            f"{model.label} is of experts that DeepSpeed's AutoEP took over, whose files are not read: convert it with "
            "DeepSpeed's own ds_to_universal"
        )
    found = Experts()
    numbers: dict[str, set[int]] = {}
    for file in files:
        for name, node in file.named():
            match = _NAME.fullmatch(name)
            if match is None:
                raise node.fail("is not named as a parameter of an expert")
            if name in found.values:
                raise node.fail("is in the files of two experts", name)
            found.values[name] = node
            numbers.setdefault(match["layer"], set()).add(int(match["expert"]))
    for layer, present in numbers.items():
        found.counts[layer] = len(present)
        if max(present) >= len(present):
            lacking = min(set(range(max(present))) - present)
            raise corrupt(model.label, f"there is no file of expert {lacking} of layer {layer.rstrip('.')}")
    config = model.find("ds_config")
    said = None if config is None else config.find(_BEFORE)
    found.teams_consecutive = said is not None and said.value is True
    return found
