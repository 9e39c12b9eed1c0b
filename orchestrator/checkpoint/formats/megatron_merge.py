"""From the ranks of a Megatron-LM checkpoint to whole tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.checkpoint import rulefile
from orchestrator.checkpoint.archive import StoredTensor
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats.deepspeed_state import merge_groups
from orchestrator.checkpoint.formats.megatron_optimizer import Held, States, held, hyper_parameters, read_states
from orchestrator.checkpoint.formats.megatron_ranks import Arguments, Grid, Rank
from orchestrator.checkpoint.formats.pickled_values import Node, Plain
from orchestrator.checkpoint.language import Rule, Rules, merge
from orchestrator.checkpoint.layout import LogicalTensor, tensor_name
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

MAX_NAME = 1000
"""Characters; no parameter is called by more, and rules take their time with long names."""
_HEAD = "word_embeddings_for_head.weight"
_TIED = {
    _HEAD: "language_model.embedding.word_embeddings.weight",
    "output_layer.weight": "embedding.word_embeddings.weight",
}
"""What the last stage of a pipeline names its copy of the embedding -> the embedding."""
BUFFER = re.compile(r".*\.(inv_freq|expert_bias|local_tokens_per_expert)")
_FEED_FORWARD = re.compile(r".*\.mlp\.((?:experts\.)?(?:local_experts\.\d+\.)?)(?:linear_fc1|dense_h_to_4h)\.weight\d*")
STATE_KEYS = ("iteration", "checkpoint_version", "num_floating_point_operations_so_far", "opt_param_scheduler", "args")
_Place = tuple[int, int, int]


def variables(arguments: Arguments) -> dict[str, int]:
    """What rules may ask of the arguments. The size of the vocabulary is not among them: the arguments hold it only
    with its padding, or as it was before the tokenizer added to it.
    """
    names = {
        "heads": "num_attention_heads",
        "headDim": "kv_channels",
        "hidden": "hidden_size",
        "ffnHidden": "ffn_hidden_size",
        "layers": "num_layers",
        "experts": "num_experts",
        "paddedVocab": "padded_vocab_size",
    }
    found = {key: value for key, name in names.items() if (value := arguments.count(name)) is not None}
    groups = arguments.count("num_query_groups") if arguments.flag("group_query_attention") else found.get("heads")
    return found if groups is None else {**found, "kvHeads": groups}


def default_rules(arguments: Arguments, architecture: str = "megatron-lm") -> Rules:
    """The rule set that fits the arguments."""
    if arguments.record is None:
        raise CheckpointError(f"{arguments.label} has no args, which say what model it is: give rules")
    if arguments.get("num_experts") is not None:
        if architecture == "megatron-lm" and not arguments.flag("swiglu"):
            raise CheckpointError(
                f"{arguments.label} has experts without SwiGLU, which no shipped rules are of: give rules"
            )
        return rulefile.named(f"{architecture}-mixtral")
    return rulefile.named(f"{architecture}-llama" if arguments.flag("swiglu") else f"{architecture}-gpt")


class Whole:
    """All ranks as one model."""

    def __init__(self, files: Files, grid: Grid, rules: Rules | None) -> None:
        self.files, self.grid = files, grid
        self.given = rules is not None
        values = variables(grid.arguments)
        self.rules = (default_rules(grid.arguments) if rules is None else rules).filled(values)
        self.notes = list(self.rules.notes)
        self.tensors: dict[str, LogicalTensor] = {}
        self.training_dtypes: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.values: dict[_Place, dict[str, Held]] = {}
        self.optimizers: dict[_Place, States] = {}
        self.names: dict[str, None] = {}
        if grid.dropped:
            self.notes.append(f"What is no tensor is left out of the model: {', '.join(grid.dropped[:5])}.")

    def view(self) -> UniversalView:
        """Build the view."""
        for place, rank in sorted(self.grid.ranks.items()):
            self._read(place, rank)
        assigned = self.rules.assign((name for name in self.names if name not in self.aliases), self.files.location)
        self.notes += self.rules.unused(assigned)
        for name, rule in assigned.items():
            self._merge(name, rule)
        for alias, name in self.aliases.items():
            self._tie(alias, name)
        if not self.given:
            self._check_feed_forward()
        iteration = self.grid.first.top.find("iteration")
        return UniversalView(
            self.files,
            step=0 if iteration is None else iteration.count(),
            generation=0,
            state=self._state(),
            tensors=self.tensors,
            source="megatron-lm",
            aliases={alias: name for alias, name in self.aliases.items() if name in self.tensors},
            training_dtypes=self.training_dtypes,
            notes=self.notes,
        )

    # ------------------------------------------------------------ one rank

    def _read(self, place: _Place, rank: Rank) -> None:
        """Name what a rank holds as the whole model does."""
        values: dict[str, StoredTensor] = {}
        trained: list[dict[str, StoredTensor]] = []
        first_expert = rank.expert * rank.experts()
        for chunk in range(len(rank.chunks)):
            variables = {"firstLayer": self._first_layer(rank, chunk), "firstExpert": first_expert}
            named = {}
            for local, tensor in rank.chunks[chunk].items():
                if len(local) > MAX_NAME:
                    raise rank.top.fail(f"holds a name of {len(local)} characters")
                name = self.rules.renamed(local, variables)
                if name in values or name in named:
                    raise rank.top.fail("is there twice", name)
                named[name] = tensor
            values.update(named)
            trained.append({name: tensor for name, tensor in named.items() if not BUFFER.fullmatch(name)})
        self._note_ties(rank, values)
        self.names.update(dict.fromkeys(values))
        self.values[place] = {name: held(tensor) for name, tensor in values.items()}
        self.optimizers[place] = read_states(self.files, rank, trained)

    def _first_layer(self, rank: Rank, chunk: int) -> int:
        """Layers before this stage: all of earlier virtual stages, and those of earlier ranks in this one."""
        first = 0
        for earlier in range(chunk + 1):
            for stage in range(self.grid.stages if earlier < chunk else rank.stage):
                first += self.grid.ranks[stage, rank.expert, rank.tensor].layers[earlier]
        return first

    def _note_ties(self, rank: Rank, values: dict[str, StoredTensor]) -> None:
        tied = not self.grid.arguments.flag("untie_embeddings_and_output_weights")
        for alias, name in _TIED.items():
            if alias in values and name not in values and tied and rank.stage:
                self.aliases[alias] = name

    # ------------------------------------------------------------ whole tensors

    def _merge(self, name: str, rule: Rule) -> None:
        groups = self._groups(name)
        dtypes = {self.values[place][name].dtype for places in groups for place in places}
        if len(dtypes) != 1:
            raise self.grid.first.top.fail(f"has the dtypes {', '.join(sorted(dtypes))} on different ranks", name)
        (dtype,) = dtypes
        kind = "buffer" if BUFFER.fullmatch(name) else "parameter"
        masters = self._found(name, groups, [self.optimizers[place].masters for places in groups for place in places])
        if masters is not None:
            self.training_dtypes.update({name: dtype} if masters[0][0].dtype != dtype else {})
            self._put(name, None, kind, rule, masters)
        else:
            self._put(name, None, kind, rule, [[self.values[place][name] for place in places] for places in groups])
        states = {
            state: None
            for places in groups
            for place in places
            for state in self.optimizers[place].states.get(name, {})
        }
        for state in states:
            pieces = self._found(
                state,
                groups,
                [self.optimizers[place].states.get(name, {}) for places in groups for place in places],
                tensor_name(name, state),
            )
            assert pieces is not None
            self._put(name, state, "state", rule, pieces)

    def _groups(self, name: str) -> list[list[_Place]]:
        """The tensor-parallel groups that hold the parameter, each complete."""
        groups = []
        for stage in range(self.grid.stages):
            for expert in range(self.grid.expert_size):
                places = [(stage, expert, tensor) for tensor in range(self.grid.tensor_size)]
                holding = [place for place in places if name in self.values[place]]
                if holding and len(holding) < len(places):
                    lacking = next(place for place in places if place not in holding)
                    raise self.grid.ranks[lacking].top.fail("lacks it, though other ranks of its group have it", name)
                groups += [places] if holding else []
        return groups

    def _found(
        self, key: str, groups: Sequence[Sequence[_Place]], ranks: Sequence[dict[str, Held]], name: str | None = None
    ) -> list[list[Held]] | None:
        """The same thing of all ranks, by group; None when no rank has it, an error when only some do."""
        found = [rank.get(key) for rank in ranks]
        present = [one for one in found if one is not None]
        if not present:
            return None
        if len(present) < len(found) or len({one.dtype for one in present}) != 1:
            raise self.grid.first.top.fail("is on some ranks only, or of another dtype on some", name or key)
        size = self.grid.tensor_size
        return [present[start : start + size] for start in range(0, len(present), size)]

    def _check_feed_forward(self) -> None:
        """Whether gate and up are fused in a matrix is known of an argument alone: its rows have to agree."""
        arguments = self.grid.arguments
        dense = arguments.count("ffn_hidden_size")
        experts = arguments.count("moe_ffn_hidden_size") or dense
        for name, tensor in self.tensors.items():
            match = _FEED_FORWARD.fullmatch(name)
            size = experts if match and match[1] else dense
            if match and size is not None:
                rows = size * (2 if arguments.flag("swiglu") else 1)
                if tensor.shape[0] != rows:
                    raise arguments.fail(f"say that it has {rows} rows, but the ranks hold {tensor.shape[0]}", name)

    def _put(self, parameter: str, state: str | None, kind: str, rule: Rule, groups: Sequence[Sequence[Held]]) -> None:
        """Merge each tensor-parallel group; what further groups hold are further copies."""
        name = tensor_name(parameter, state)
        for group in groups:
            shapes = {one.shard.shape for one in group}
            if len(shapes) > 1:  # Megatron-LM divides evenly or not at all
                words = " and ".join(str(list(shape)) for shape in sorted(shapes)[:4])
                raise self.grid.first.top.fail(f"is {words} on ranks of one group", name)
        first, *rest = (
            merge(name, parameter, state, kind, group[0].dtype, rule, [one.shard for one in group]) for group in groups
        )
        for other in rest:
            if other.shape != first.shape:
                raise self.grid.first.top.fail(f"is {list(first.shape)} and {list(other.shape)} on two stages", name)
            first = replace(first, others=(*first.others, other.chunks, *other.others))
        if state == "step":
            if len({chunk.data for copy in (first.chunks, *first.others) for chunk in copy}) > 1:
                raise self.grid.first.top.fail("has different steps on different ranks", name)
            first = replace(first, others=())
        self.tensors[name] = first

    def _tie(self, alias: str, name: str) -> None:
        """What the last stage holds of the embedding is a further copy of it."""
        embedding = self.tensors.get(name)
        if embedding is None:
            raise self.grid.first.top.fail("is not there, though it is tied", name)
        before = set(self.tensors)
        self._merge(alias, self.rules.match(name))
        for copied in [key for key in self.tensors if key not in before]:
            copy = self.tensors.pop(copied)
            original = self.tensors.get(tensor_name(name, copy.state))
            if original is None or original.shape != copy.shape or original.dtype != copy.dtype:
                raise self.grid.first.top.fail(f"is not like {name}, with which it is tied", copied)
            if copy.state != "step":
                others = (*original.others, copy.chunks, *copy.others)
                self.tensors[original.name] = replace(original, others=others)
        self.training_dtypes.pop(alias, None)

    # ------------------------------------------------------------ beside tensors

    def _state(self) -> dict[str, Any]:
        plain = Plain(self.files)
        top = self.grid.first.top
        state = {key: plain.of(node) for key in STATE_KEYS if (node := top.find(key)) is not None}
        optimizer = top.find("optimizer")
        scaler = None if optimizer is None else optimizer.find("grad_scaler")
        if scaler is not None:
            state["grad_scaler"] = plain.of(scaler)
        groups = []
        for states in self.optimizers.values():
            described = []
            for group, names in states.groups:
                hyper = plain.of(Node(hyper_parameters(group), group.label, group.path))
                described.append((hyper, [name for name in names if name not in self.aliases]))
            groups.append(described)
        state["param_groups"] = [group for group in merge_groups(groups) if group["params"]]
        left = [key for key in top.mapping() if isinstance(key, str) and key.startswith("rng_state")]
        dropped = [*dict.fromkeys(path.split("[")[0] for path in plain.dropped), *left]
        if dropped:
            self.notes.append(f"What is not plain data is left out of the state: {', '.join(dropped[:10])}.")
        if not any(states.states for states in self.optimizers.values()):
            self.notes.append("The checkpoint holds no optimizer states.")
        return state
