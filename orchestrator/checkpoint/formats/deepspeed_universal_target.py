"""Any view as DeepSpeed's universal checkpoint, which DeepSpeed resumes from at any number of data-parallel ranks.

<parent>/<target>/zero/<parameter>/<state>.pt       as `deepspeed_universal` reads them; tied names are links
<parent>/<target>/zero/optimizer_state.pt           groups for every stage, so that only tensors and names differ
<parent>/<target>/[zero_pp_rank_0_]mp_rank_00_model_states.pt
<parent>/latest_universal                           written last

DeepSpeed restores neither buffers nor what is not trained from a universal checkpoint: they are in the model file's
`module`, for the training script to load.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.checkpoint.durable import replace_durably
from orchestrator.checkpoint.formats.deepspeed_module import listed
from orchestrator.checkpoint.formats.deepspeed_sharding import sharding
from orchestrator.checkpoint.formats.deepspeed_universal import INFO, LATEST, OPTIMIZER, VALUE
from orchestrator.checkpoint.formats.torch_archive import Storage, TorchFile, archive
from orchestrator.checkpoint.formats.torch_pickle import Instance, Tensor, size
from orchestrator.checkpoint.formats.universal import read_steps
from orchestrator.checkpoint.layout import LogicalTensor
from orchestrator.checkpoint.manifest import digest_of
from orchestrator.checkpoint.numbers import FLOATS
from orchestrator.checkpoint.stream import Limits, Progress
from orchestrator.checkpoint.target import partial
from orchestrator.checkpoint.unpickle import Name
from orchestrator.checkpoint.view import UniversalView
from orchestrator.core.errors import CheckpointError, InvalidInput

STAGES = (1, 2, 3)
VERSION = "0.19.8"
"""The DeepSpeed whose files these are."""
ADAM = ("exp_avg", "exp_avg_sq")
"""The only states that DeepSpeed loads under ZeRO 3, where it does not do without them."""
STEP = "step"
USUAL_RANKS = range(2, 65)
"""Numbers of data-parallel ranks for which it is noted that DeepSpeed could not load a parameter group."""
_SCALERS = Name("deepspeed.runtime.fp16.loss_scaler", "")
_DYNAMIC = (
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "scale_factor",
    "scale_window",
    "min_scale",
    "delayed_shift",
    "cur_hysteresis",
    "consecutive_hysteresis",
    "raise_error_at_min_scale",
)
"""All attributes of a dynamic loss scaler, its dtype and class apart."""
_OPTIMIZER_STATE = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")


def write_deepspeed_universal(
    view: UniversalView, target: Path, *, stage: int, limits: Limits, progress: Progress
) -> tuple[str, ...]:
    """Write `view` to the new folder `target`, for DeepSpeed under ZeRO `stage`; streamed, and whole once it is there.

    Returns what the reader should know. Raises `InvalidInput` for another stage, `CheckpointError` for what DeepSpeed
    could not load, `Conflict` when the target exists, and what reading and writing raise.
    """
    if stage not in STAGES:
        raise InvalidInput(f"{stage} is not a ZeRO stage with universal checkpoints: choose 1, 2 or 3")
    plan = _Plan(view, stage)
    files = [*plan.tensors(), plan.optimizer(), plan.model()]
    outputs = [one.output for one in files]
    with partial(target) as folder:
        names = [(one.name, one.size_bytes, digest_of(b"".join(data for _, data in one.literals))) for one in outputs]
        folder.fill(view, outputs, names, limits, progress)
        with ThreadPoolExecutor(limits.threads) as pool:
            list(pool.map(lambda one: one.seal(folder.directory), files))
        for alias, owner in plan.aliases.items():
            _link(folder.directory / "zero" / owner, folder.directory / "zero" / alias)
        folder.publish()
    replace_durably(target.absolute().parent / LATEST, target.name.encode())
    return tuple(plan.notes)


def _link(owner: Path, alias: Path) -> None:
    """The same files under another name, without their bytes again where the file system can."""
    alias.mkdir(exist_ok=True)
    for file in owner.iterdir():
        link = alias / file.name
        link.unlink(missing_ok=True)
        try:
            os.link(file, link)
        except OSError:
            shutil.copyfile(file, link)


@dataclass(slots=True)
class _Group:
    """Parameters of one parameter group, and what DeepSpeed keeps once for all of them."""

    hyper: dict[str, Any]
    names: list[str]
    states: list[LogicalTensor] = field(default_factory=list)
    """One example of each state."""
    step: float | None = None


class _Plan:
    """What goes into which file."""

    def __init__(self, view: UniversalView, stage: int) -> None:
        self.view, self.stage = view, stage
        self.notes: list[str] = []
        self._by_parameter: dict[str, dict[str, LogicalTensor]] = {}
        for tensor in view.tensors.values():
            if tensor.state is not None:
                self._by_parameter.setdefault(tensor.parameter, {})[tensor.state] = tensor
        trained = [one.name for one in view.tensors.values() if self._is_trained(one)]
        self.groups = self._groups(trained)
        self.trained = {name: view.tensors[name] for group in self.groups for name in group.names}
        self.aliases = {alias: owner for alias, owner in view.aliases.items() if owner in self.trained}
        for name in (*self.trained, *self.aliases):
            _require_folder_name(name)
        rounded = [name for name, one in self.trained.items() if one.dtype == "F64"]
        if rounded:
            self.notes.append(f"DeepSpeed trains in fp32: {listed(rounded)} of dtype F64 is rounded to that.")
        for group in self.groups:
            group.states = self._states(group)
        self._require_loadable_states()
        self._add_steps()
        self._note_small_groups()

    def _is_trained(self, tensor: LogicalTensor) -> bool:
        return (
            tensor.kind == "parameter"
            and tensor.name not in self.view.frozen
            and tensor.dtype in FLOATS
            and 0 not in tensor.shape
        )

    def _groups(self, trained: Sequence[str]) -> list[_Group]:
        """The source's groups; what is in none comes last."""
        left = dict.fromkeys(trained)
        groups = []
        for given in self.view.state.get("param_groups", []):
            names = [self.view.aliases.get(name, name) for name in given.get("params", [])]
            hyper = {key: value for key, value in given.items() if key != "params"}
            groups.append(_Group(hyper, [name for name in dict.fromkeys(names) if name in left]))
            for name in groups[-1].names:
                del left[name]
        if left and groups:
            self.notes.append(f"{len(left)} parameters are in none of the source's groups: they come as a further one.")
        return [*groups, _Group({}, list(left))] if left else groups

    def _states(self, group: _Group) -> list[LogicalTensor]:
        """The states that are made of one element per element of a parameter; others DeepSpeed has no place for."""
        found: dict[str, LogicalTensor] = {}
        for name in group.names:
            for state, tensor in self._of(name).items():
                if state == STEP:
                    continue
                if tensor.shape == self.view.tensors[name].shape and tensor.dtype in FLOATS:
                    found.setdefault(state, tensor)
                else:
                    self.notes.append(f"{tensor.name} is not made of one number per element: DeepSpeed cannot hold it.")
        return list(found.values())

    def _of(self, name: str) -> dict[str, LogicalTensor]:
        return self._by_parameter.get(name, {})

    def _require_loadable_states(self) -> None:
        known = {str(one.state) for group in self.groups for one in group.states}
        if self.stage < 3:
            return
        others = sorted(known - set(ADAM))
        if others:
            raise CheckpointError(
                f"DeepSpeed loads no optimizer state but {' and '.join(ADAM)} under ZeRO 3, but the source has "
                f"{', '.join(others)}: write it for stage 1 or 2"
            )
        if not known:
            self.notes.append(
                "The source has no optimizer state: under ZeRO 3 load it with load_optimizer_states=False."
            )
            return
        examples = {str(one.state): one for group in self.groups for one in group.states}
        for group in self.groups:
            group.states = list(examples.values())

    def _add_steps(self) -> None:
        steps = read_steps(self.view)
        for group in self.groups:
            known = {name: steps[name] for name in group.names if name in steps}
            if known:
                group.step = max(known.values())
            elif group.states and self.view.step:
                group.step = float(self.view.step)
            behind = [name for name, step in known.items() if step != group.step]
            if behind:
                self.notes.append(
                    f"DeepSpeed keeps one step per parameter group: {len(behind)} parameters, {behind[0]} among them, "
                    f"get step {group.step:g} instead of {known[behind[0]]:g}."
                )
        if self.stage == 3 and len({group.step for group in self.groups if group.step is not None}) > 1:
            self.notes.append("DeepSpeed keeps one step for all parameters under ZeRO 3: the largest is taken.")

    def _note_small_groups(self) -> None:
        for index, group in enumerate(self.groups if self.stage < 3 else ()):
            count = sum(prod(self.trained[name].shape) for name in group.names)
            ranks = next((ranks for ranks in USUAL_RANKS if _leaves_rank_empty(count, ranks)), None)
            if count and ranks:
                self.notes.append(
                    f"Parameter group {index} has {count} elements: on {ranks} ranks, where one holds none of them, "
                    "DeepSpeed stops with an IndexError as it loads them under ZeRO 1 or 2; stage 3 has no such limit."
                )

    # ------------------------------------------------------------ files

    def tensors(self) -> Iterable[TorchFile]:
        """A file per parameter and state."""
        info = self.view.state.get(INFO)
        for group in self.groups:
            for name in group.names:
                extra = sharding(info, name, self.trained[name].shape) if self.stage < 3 else {}
                yield self._file(name, VALUE, Storage("F32", self.trained[name].shape, name), extra)
                for example in group.states:
                    state = str(example.state)
                    tensor = self._of(name).get(state)
                    # A parameter that was never used has no moments, which is to say that they are zero.
                    dtype, source = (example.dtype, None) if tensor is None else (tensor.dtype, tensor.name)
                    yield self._file(name, state, Storage(dtype, self.trained[name].shape, source), extra)
                if group.step is not None and self.stage < 3:
                    yield archive(f"zero/{name}/{STEP}.pt", Tensor(0, "F32", ()), [_number(group.step)])

    def _file(self, name: str, state: str, storage: Storage, extra: dict[str, Any]) -> TorchFile:
        file = f"zero/{name}/{state}.pt"
        if self.stage == 3:
            return archive(file, Tensor(0, storage.dtype, (prod(storage.shape),)), [storage])
        return archive(file, {**extra, "param": Tensor(0, storage.dtype, storage.shape)}, [storage])

    def optimizer(self) -> TorchFile:
        """`optimizer_state.pt`: the engine's scalars, the groups by position; for ZeRO 3 also the step."""
        given = self.view.state
        value: dict[str, Any] = {key: _plain(given[key]) for key in _OPTIMIZER_STATE if key in given}
        value |= self._loss_scaler(value.pop("loss_scaler", None))
        value |= {"zero_stage": self.stage, "ds_version": VERSION}
        groups = [
            {key: _hyper(member) for key, member in group.hyper.items()} | {"params": [index]}
            for index, group in enumerate(self.groups)
        ]
        value["param_groups"] = groups
        step = max((group.step for group in self.groups if group.step is not None), default=None)
        storages = []
        if self.stage == 3:
            state = {} if step is None else {0: {STEP: Tensor(0, "F32", ())}}
            storages = [] if step is None else [_number(step)]
            value["optimizer_state_dict"] = {"state": state, "param_groups": [_shared(groups)]}
        return archive(OPTIMIZER, value, storages)

    def _loss_scaler(self, given: Any) -> dict[str, Any]:
        if not isinstance(given, dict):
            return {}
        if given.get("dynamic") and all(key in given for key in _DYNAMIC):
            attributes = {key: given[key] for key in _DYNAMIC} | {"dynamic": True, "dtype": Name("torch", "float16")}
            return {"loss_scaler": Instance(Name(_SCALERS.module, "DynamicLossScaler"), attributes)}
        if not given.get("dynamic") and isinstance(given.get("cur_scale"), float | int):
            attributes = {"cur_scale": given["cur_scale"], "dynamic": False}
            return {"loss_scaler": Instance(Name(_SCALERS.module, "LossScaler"), attributes)}
        self.notes.append("The source's loss scaler is not one of DeepSpeed's: it starts anew.")
        return {}

    def model(self) -> TorchFile:
        """The model file: shapes, buffers, what is not trained, and the engine's and the script's own state."""
        module, storages = self._module()
        frozen = {name: tensor for name, tensor in module.items() if name in self.view.frozen}
        dtypes = {self.view.training_dtypes.get(name, one.dtype) for name, one in self.trained.items()}
        state = {key: _plain(value) for key, value in self.view.state.items()}
        for key in ("param_groups", *_OPTIMIZER_STATE):
            state.pop(key, None)
        value = {
            "global_steps": self.view.step,
            "skipped_steps": 0,
            "lr_scheduler": None,
            **state,
            "module": module,
            "buffer_names": [one.name for one in self.view.tensors.values() if one.kind == "buffer"],
            "optimizer": None,
            "param_shapes": [{name: size(self.trained[name].shape) for name in group.names} for group in self.groups],
            "frozen_param_shapes": {name: size(one.shape) for name, one in frozen.items()},
            "frozen_param_fragments": {name: self._fragment(one) for name, one in frozen.items()},
            "shared_params": dict(self.view.aliases),
            "data_sampler": None,
            "random_ltd": None,
            "dp_world_size": 1,
            "mp_world_size": 1,
            "ds_config": {
                "zero_optimization": {"stage": self.stage},
                "bf16": {"enabled": dtypes == {"BF16"}},
                "fp16": {"enabled": dtypes == {"F16"}},
            },
            "ds_version": VERSION,
        }
        prefix = "zero_pp_rank_0_" if self.stage == 3 else ""
        return archive(f"{prefix}mp_rank_00_model_states.pt", value, storages)

    def _module(self) -> tuple[dict[str, Tensor], list[Storage]]:
        """Under ZeRO 3 without what is trained, which DeepSpeed's own files do not hold either."""
        module: dict[str, Tensor] = {}
        storages: list[Storage] = []
        for tensor in self.view.tensors.values():
            if tensor.kind == "state" or (self.stage == 3 and tensor.name in self.trained):
                continue
            dtype = self.view.training_dtypes.get(tensor.name, tensor.dtype)
            module[tensor.name] = Tensor(len(storages), dtype, tensor.shape)
            storages.append(Storage(dtype, tensor.shape, tensor.name))
        module |= {alias: module[owner] for alias, owner in self.view.aliases.items() if owner in module}
        return module, storages

    def _fragment(self, tensor: Tensor) -> Tensor:
        """All of it: under ZeRO 3 flattened, as from a single rank."""
        return Tensor(tensor.storage, tensor.dtype, (prod(tensor.shape),)) if self.stage == 3 else tensor


def _leaves_rank_empty(count: int, ranks: int) -> bool:
    """Whether the last of the ranks holds padding only of a group of `count` elements, as ZeRO 1 and 2 cut it."""
    share = 2 * -(-count // (2 * ranks))
    return (ranks - 1) * share >= count


def _number(step: float) -> Storage:
    return Storage("F32", (), data=np.float32(step).tobytes())


def _shared(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The hyper-parameters that all groups have in common.

    Under ZeRO 3 DeepSpeed gives every group those of the first: so the first says none that others have not, and each
    group keeps what the training script has given it.
    """
    first, *others = groups or [{}]
    return {key: value for key, value in first.items() if all(key in one and one[key] == value for one in others)} | {
        "params": [0]
    }


def _plain(value: Any) -> Any:
    """JSON-able values with the keys that were numbers (the milestones of torch's schedulers) as numbers again."""
    if isinstance(value, list):
        return [_plain(member) for member in value]
    if not isinstance(value, dict):
        return value
    numbers = value and all(key.isdecimal() and len(key) < 19 for key in value)
    return {int(key) if numbers else key: _plain(member) for key, member in value.items()}


def _hyper(value: Any) -> Any:
    """Pairs (betas) as tuples, which torch's optimizers keep and JSON does not have."""
    return tuple(map(_hyper, value)) if isinstance(value, list) else value


def _require_folder_name(name: str) -> None:
    if "/" in name or "\0" in name or name in ("", ".", "..") or len(os.fsencode(name)) > 255:
        raise CheckpointError(
            f"parameter {name[:100]!r} cannot have a folder of its name, as DeepSpeed's universal checkpoints need: "
            "rename it"
        )
