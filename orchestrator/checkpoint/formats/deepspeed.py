"""DeepSpeed checkpoints as they are saved: ZeRO 1, 2 and 3 or none, with pipeline stages and tensor-parallel ranks.

Files, names and topology are in `deepspeed_files`, flat vectors in `deepspeed_zero12` and `deepspeed_zero3`, weights of
modules in `deepspeed_module`, experts in `deepspeed_experts`, stages without ZeRO in `deepspeed_stages`, the merging of
model-parallel ranks in `deepspeed_parallel` and `deepspeed_rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from orchestrator.checkpoint.archive import load_archive
from orchestrator.checkpoint.fields import corrupt
from orchestrator.checkpoint.files import Files
from orchestrator.checkpoint.formats import Reading
from orchestrator.checkpoint.formats import deepspeed_zero3 as zero3
from orchestrator.checkpoint.formats import deepspeed_zero12 as zero12
from orchestrator.checkpoint.formats.deepspeed_experts import Experts, read_experts
from orchestrator.checkpoint.formats.deepspeed_files import Found, checkpoints, chosen
from orchestrator.checkpoint.formats.deepspeed_flat import Parameter, Shape
from orchestrator.checkpoint.formats.deepspeed_module import Module, complete, listed
from orchestrator.checkpoint.formats.deepspeed_parallel import Copies, layer_names, merge_ranks
from orchestrator.checkpoint.formats.deepspeed_rules import INFO, Chooser
from orchestrator.checkpoint.formats.deepspeed_stages import Layer, Stages, tied_layers
from orchestrator.checkpoint.formats.deepspeed_state import (
    config_dtype,
    hyper_parameters,
    merge_groups,
    plain_state,
    step_of_model,
)
from orchestrator.checkpoint.formats.deepspeed_unpartitioned import Unpartitioned, can_be_of
from orchestrator.checkpoint.formats.pickled_values import Node, Plain
from orchestrator.checkpoint.unpickle import Name, Record
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError

NAME = "deepspeed"

_STAGES = ("disabled", "optimizer_states", "gradients", "weights")
"""Members of DeepSpeed's `ZeroStageEnum`, which early Python 3.11 pickles by name: `getattr(class, name)`."""


def recognise(files: Files) -> bool:
    """Whether a folder holds files that are named as DeepSpeed names them."""
    try:
        return bool(checkpoints(files))
    except CheckpointError:
        return True  # it is one, with a flaw that reading it will name


def open_files(files: Files, reading: Reading) -> UniversalView:
    """The view of the checkpoint that `reading.tag` names, else the newest; reads metadata only."""
    tag, found = chosen(files, reading)
    return _Source(files, tag, found, reading).view()


class _Source:
    """One checkpoint while its view is built."""

    def __init__(self, files: Files, tag: str, found: Found, reading: Reading) -> None:
        self.files, self.tag, self.found, self.reading = files, tag, found, reading
        self.notes: list[str] = []
        self.partitioned = bool(found.zero_models)
        """Whether the weights are cut over the data-parallel ranks, too (ZeRO 3)."""
        self.models: dict[tuple[int, int], Node] = {}
        """(model-parallel rank, data-parallel rank) -> model file; of others than rank 0 where they hold more."""
        self.optimizers: dict[int, list[Node]] = {}
        """Model-parallel rank -> `optimizer_state_dict` of every data-parallel rank."""
        self.shapes: dict[int, list[dict[str, Shape]]] = {}
        """Model-parallel rank -> `param_shapes`."""
        self.experts: dict[int, Experts] = {}
        """Model-parallel rank -> experts that are in files of their own."""
        self.unpartitioned: list[list[tuple[dict[str, Any], list[str]]]] = []
        """Without ZeRO: of each tensor-parallel rank the groups' hyper-parameters and names."""

    def view(self) -> UniversalView:
        count = self._load()
        stages, ranks = self._topology(count)
        copies, aliases = [], {}
        for rank in range(ranks):
            parameters, tied = self._rank(rank, stages, ranks)
            copies.append(parameters)
            aliases.update(tied)
        first = self.models[0, 0]
        info = first.find(INFO) or (self.optimizers[0][0].find(INFO) if self.optimizers else None)
        chooser = Chooser(info, self.reading.rules, ranks)
        whole = merge_ranks(first.label, copies, chooser, self.notes)
        self.notes += chooser.notes()
        state = plain_state(self.files, first, self._optimizer_of_state(), self.notes)
        if info is not None and INFO not in state:
            state[INFO] = Plain(self.files).of(info)
        state["param_groups"] = self._groups()
        return UniversalView(
            self.files,
            step=step_of_model(first),
            generation=0,
            state=state,
            tensors=whole.tensors,
            source=f"{NAME} zero {self._stage()}",
            aliases={alias: owner for alias, owner in aliases.items() if owner in whole.tensors},
            frozen=whole.frozen,
            training_dtypes=whole.training_dtypes,
            notes=dict.fromkeys(self.notes),
        )

    # ------------------------------------------------------------ files

    def _load(self) -> int:
        """Read the metadata of all files; returns the number of model-parallel ranks."""
        found = self.found
        models = {(mp, 0): file for mp, file in found.models.items()} if not self.partitioned else found.zero_models
        count = 1 + max(mp for mp, _ in (*models, *found.optimizers))
        for mp in range(count):
            if (mp, 0) not in models:
                prefix = "zero_pp_rank_0_" if self.partitioned else ""
                raise self._missing(f"{prefix}mp_rank_{mp:02d}_model_states.pt")
            first = self.models[mp, 0] = self._file(models[mp, 0])
            if first.mapping().keys().isdisjoint(("module", "param_shapes")):
                raise first.fail("holds neither module nor param_shapes, so that it is no model file")
            self._load_experts(mp, first)
            world = self._load_optimizers(mp, first)
            for dp in range(1, world if _has_fragments(first) else 1):
                if (mp, dp) in models:
                    self.models[mp, dp] = self._file(models[mp, dp])
            if self.optimizers:
                self.shapes[mp] = self._shapes(mp)
        return count

    def _load_experts(self, mp: int, model: Node) -> None:
        """The weights of the experts of one model-parallel rank, whose layers count from 0."""
        present = {key[1:]: file for key, file in sorted(self.found.experts.items()) if key[0] == mp}
        layers = model.find("num_experts")
        for layer, number in enumerate(layers.items() if present and layers is not None else ()):
            for expert in range(number.count() if (layer, 0) in present else 0):
                if (layer, expert) not in present:
                    raise self._missing(f"layer_{layer}_expert_{expert}_mp_rank_{mp:02d}_model_states.pt")
        self.experts[mp] = read_experts(model, (self._file(file) for file in present.values()))

    def _load_optimizers(self, mp: int, model: Node) -> int:
        """The optimizer files of one model-parallel rank; returns the number of its data-parallel ranks."""
        present = {dp: file for (rank, dp), file in self.found.optimizers.items() if rank == mp}
        if not present:
            # DeepSpeed writes down shapes only where ZeRO keeps the masters in files of their own.
            if self.found.optimizers or self.partitioned or model.find("param_shapes") is not None:
                raise self._missing(f"zero_pp_rank_0_mp_rank_{mp:02d}_optim_states.pt")
            return 1
        first = self._optimizer(present[min(present)])
        said = None if self.experts[mp].counts else first.find("partition_count")  # experts' are cut over fewer
        world = _world(said, model) or len(present)
        ranks = []
        for dp in range(world):
            if dp not in present:
                raise self._missing(f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt")
            ranks.append(first if dp == min(present) else self._optimizer(present[dp]))
        extra = sorted(dp for dp in present if dp >= world)
        if extra:
            self.notes.append(
                f"The checkpoint was saved by {world} data-parallel ranks: files of ranks from {extra[0]} on are of an "
                "older save and are not read."
            )
        self.optimizers[mp] = ranks
        return world

    def _file(self, file: str) -> Node:
        node = Node(load_archive(self.files, file), self.files.label(file))
        node.mapping()
        return node

    def _optimizer(self, file: str) -> Node:
        node = self._file(file).at("optimizer_state_dict")
        node.mapping()
        return node

    def _missing(self, name: str) -> CheckpointError:
        return corrupt(self.files.label(self.found.folder + name), "it is missing")

    def _shapes(self, mp: int) -> list[dict[str, Shape]]:
        """`param_shapes`, which all data-parallel ranks of ZeRO 3 repeat."""
        model = self.models[mp, 0]
        shapes = model.find("param_shapes")
        if shapes is None:
            return zero12.shapes_of_mappings(self.optimizers[mp], self._known_shapes(mp))
        groups = [shapes] if isinstance(shapes.value, dict) else shapes.items()
        found = [{name: shape.shape(name) for name, shape in group.named()} for group in groups]
        for (rank, dp), other in self.models.items():
            if rank == mp and dp and other.at("param_shapes").value != shapes.value:
                raise other.at("param_shapes").fail("is another than that of data-parallel rank 0")
        return found

    def _known_shapes(self, mp: int) -> dict[str, Shape]:
        """The shapes of the module's tensors, under the names that the optimizer's slices have."""
        module = self.models[mp, 0].find("module")
        if module is not None:
            return {name: node.tensor(name).shape for name, node in module.named()}
        slices = [one for rank in self.optimizers[mp] for one in rank.at(zero12.MAPPINGS).items()]
        names = {name for one in slices for name, _ in one.named()}
        ranks = 1 + max((tp for _, tp in self.found.layers), default=0)
        shapes: dict[str, Shape] = {}
        for (layer, tp), file in self.found.layers.items():
            if tp == mp % ranks:
                local = dict(self._file(file).named())
                prefix, _ = layer_names(layer, set(local), names)
                shapes |= {prefix + name: node.tensor(name).shape for name, node in local.items()}
        return shapes

    # ------------------------------------------------------------ ranks

    def _topology(self, count: int) -> tuple[int, int]:
        """Pipeline stages and tensor-parallel ranks; model-parallel ranks count stage by stage."""
        said = self.models[0, 0].find("checkpoint_parallel_dimensions")
        if said is not None:
            stages, ranks = said.at("pp_degree").count(), said.at("tp_degree").count()
        else:
            ranks = 1 + max((tp for _, tp in self.found.layers), default=count - 1)
            stages = count // ranks if self.found.layers else 1
        if stages * ranks != count:
            raise corrupt(
                self.models[0, 0].label,
                f"{count} model-parallel ranks have files where {stages} pipeline stages of {ranks} tensor-parallel "
                "ranks are expected",
            )
        return stages, ranks

    def _rank(self, rank: int, stages: int, ranks: int) -> tuple[Copies, dict[str, str]]:
        """What one tensor-parallel rank of all stages holds, and the tied names."""
        copies: Copies = {}
        module = Module()
        for mp in range(rank, stages * ranks, ranks):
            for name, parameter in self._parameters(mp).items():
                copies.setdefault(name, []).append(parameter)
            models = [node for (other, _), node in sorted(self.models.items(), key=lambda item: item[0]) if other == mp]
            values = models[0].find("module")
            for index, model in enumerate(models):
                module.take(model, values.named() if values is not None and not index else ())
            self.experts[mp].put_into(module)
            self._take_fragments(module, mp, models)
        for model in self.models.values():
            module.take_shared(model)  # only the very first rank writes it
        layers = self._take_layers(module, copies, rank) if self.found.layers else []
        if not self.optimizers:
            models = [self.models[mp, 0] for mp in range(rank, stages * ranks, ranks)]
            self._take_unpartitioned(module, copies, layers, models, rank)
        parameters = {name: held[0] for name, held in copies.items()}
        tied = complete(self.files, module, parameters, partitioned=self.partitioned, notes=self.notes)
        trained = config_dtype(self.models[0, 0])
        weights_only = not self.optimizers and self.models[rank, 0].find("optimizer") is None
        for name, parameter in parameters.items():
            copies.setdefault(name, [parameter])
            parameter.frozen = parameter.frozen and not weights_only
            if parameter.training_dtype is None:
                parameter.training_dtype = trained
        return copies, tied

    def _parameters(self, mp: int) -> dict[str, Parameter]:
        ranks = self.optimizers.get(mp)
        if ranks is None:
            return {}
        if self._is_zero3(mp):
            return zero3.read_subgroups(self.files, self.shapes[mp], ranks, self.notes)
        return zero12.read_groups(self.files, self.shapes[mp], ranks, self.notes, self.experts[mp])

    def _is_zero3(self, mp: int) -> bool:
        return zero3.FP32 in self.optimizers[mp][0].mapping()

    def _take_fragments(self, module: Module, mp: int, models: Sequence[Node]) -> None:
        """What is not trained: cut over the data-parallel ranks with ZeRO 3, whole in the one file below."""
        world = len(self.optimizers[mp]) if _has_fragments(models[0]) and self.partitioned else 1
        for dp in range(world):
            if (mp, dp) not in self.models:
                raise self._missing(f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_model_states.pt")
        module.take_fragments(models)

    def _take_layers(self, module: Module, copies: Copies, rank: int) -> list[Layer]:
        """The weights of a pipeline's layers, under the names of the whole model."""
        known = copies.keys() | (module.buffers or set()) | module.frozen_shapes.keys()
        layers = sorted({layer for layer, _ in self.found.layers})
        found = []
        for layer in layers:
            if (layer, rank) not in self.found.layers:
                raise self._missing(f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
            node = self._file(self.found.layers[layer, rank])
            local = dict(node.named())
            prefix, unclear = layer_names(layer, set(local), known)
            found.append(Layer(prefix, local))
            if unclear and any(prefix + name not in copies for name in local):
                self.notes.append(
                    f"{node.label} is of one of several tied modules of equal names: what it holds besides trained "
                    f"parameters is named {prefix}."
                )
        due = {int(name.split(".", 1)[0]) for name in known if name.split(".", 1)[0].isdecimal()}
        for layer in sorted(due - set(layers)):
            raise self._missing(f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
        owners = {} if self.optimizers else tied_layers(self.files, found)
        for one in found:
            owner = owners.get(one.prefix, one.prefix)
            module.shared.update({one.prefix + name: owner + name for name in one.tensors if owner != one.prefix})
            module.take_values((owner + name, value) for name, value in one.tensors.items())
        if owners:
            first = listed([name.rstrip(".") for name in dict.fromkeys(owners.values())])
            self.notes.append(
                f"Layers that hold the same weights are taken to be one tied module, named by the first, {first}: no "
                "file says its name."
            )
        return [Layer(owners.get(one.prefix, one.prefix), one.tensors) for one in found]

    def _take_unpartitioned(
        self, module: Module, copies: Copies, layers: list[Layer], models: list[Node], rank: int
    ) -> None:
        """The parameters that the optimizers of the stages, or of the owners of experts, train (no ZeRO)."""
        optimizers = [model.find("optimizer") for model in models]
        present = [optimizer for optimizer in optimizers if optimizer is not None]
        parts = [module]
        if len(models) == 1 and self.found.expert_optimizers:
            present = self._expert_optimizers(rank)
            fits = partial(can_be_of, self.files, present[0])
            parts = self.experts[rank].parts(module, len(present), fits)
        elif len(present) != len(models):
            return
        elif len(models) > 1:
            parts = Stages(self.files, present, layers, module).split(models[0].label)
        for optimizer, part in zip(present, parts, strict=True):
            inside = Unpartitioned(self.files, optimizer, part, self.notes)
            groups = inside.read()
            hyper = hyper_parameters(self.files, inside.groups, self.notes)
            self.unpartitioned.append(list(zip(hyper, [list(group) for group in groups], strict=True)))
            for group in groups:
                for name, parameter in group.items():
                    if len(models) > 1 or name not in copies:
                        copies.setdefault(name, []).append(parameter)

    def _expert_optimizers(self, mp: int) -> list[Node]:
        """Of every rank that has experts of its own the optimizer that it saved."""
        found = {owner: file for (rank, owner), file in self.found.expert_optimizers.items() if rank == mp}
        for owner in range(1 + max(found, default=0)):
            if owner not in found:
                raise self._missing(f"expp_rank_{owner}_mp_rank_{mp:02d}_optim_states.pt")
        return [self._file(found[owner]).at("optimizer") for owner in sorted(found)]

    # ------------------------------------------------------------ state

    def _optimizer_of_state(self) -> Node | None:
        return self.optimizers[0][0] if self.optimizers else self.models[0, 0].find("optimizer")

    def _stage(self) -> int:
        if not self.optimizers:
            return 0
        said = self.optimizers[0][0].find("zero_stage")
        if said is None:
            return 1
        match said.value:
            case Record(name=Name("builtins", "getattr"), args=(Name(), str(member))) if member in _STAGES:
                return _STAGES.index(member)
        return said.count()

    def _groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the whole model."""
        ranks = list(self.unpartitioned)
        for mp in sorted(self.optimizers):
            optimizer, shapes = self.optimizers[mp][0], self.shapes[mp]
            if self._is_zero3(mp):
                inner = optimizer.at(zero3.OPTIMIZER)
                names = [
                    [name for one in subgroups for name in shapes[one]]
                    for subgroups in zero3.subgroups_of(inner, len(shapes))
                ]
                hyper = hyper_parameters(self.files, inner.at("param_groups"), self.notes)
            else:
                names = zero12.group_names(shapes, self.optimizers[mp], self.experts[mp])
                hyper = self._hyper_parameters(optimizer, len(shapes))
            ranks.append(list(zip(hyper, names, strict=True)))
        return merge_groups(ranks)

    def _hyper_parameters(self, optimizer: Node, count: int) -> list[dict[str, Any]]:
        states = optimizer.find(zero12.STATES)
        groups = None if states is None else states.find("param_groups")
        if groups is None:
            self.notes.append("The checkpoint does not hold the hyper-parameters of the optimizer's groups.")
            return [{} for _ in range(count)]
        if len(groups.items()) != count:
            raise groups.fail(f"has {len(groups.items())} groups where param_shapes has {count}")
        return hyper_parameters(self.files, groups, self.notes)


def _world(counts: Node | None, model: Node) -> int | None:
    """The number of data-parallel ranks that saved the checkpoint; None where the files do not say."""
    for node in (counts, model.find("dp_world_size")):
        if node is not None:
            found = [one.count() for one in node.items()] if isinstance(node.value, list | tuple) else [node.count()]
            if found:
                return max(found)
    return None


def _has_fragments(model: Node) -> bool:
    """Whether every data-parallel rank of ZeRO 3 has its part of parameters that are not trained."""
    shapes = model.find("frozen_param_shapes")
    return shapes is not None and any(0 not in shape.shape(name) for name, shape in shapes.named())
