"""Schema -> `JobSpec`: defaults and paths filled in, and checks that need more than one key or the file system."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.core.errors import InvalidInput
from orchestrator.core.spec import (
    AutoInterval,
    AxisBounds,
    Budget,
    CheckpointSpec,
    FailureClass,
    JobSpec,
    ModelSpec,
    RecoverySpec,
    default_budgets,
)
from orchestrator.core.types import Entrypoint
from orchestrator.jobfile.huggingface import read_config
from orchestrator.jobfile.schema import (
    BatchKeys,
    BudgetsKeys,
    CheckpointKeys,
    EntrypointKeys,
    ModelKeys,
    NodesKeys,
    ParallelismKeys,
    RecoveryKeys,
    TrainingJob,
)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def resolve(job: TrainingJob, base: Path, source: str) -> JobSpec:
    """The core's form of `job`, paths taken from the folder `base`; raises `InvalidInput` beginning with `source`."""
    try:
        return _resolve(job, base)
    except InvalidInput as error:
        raise InvalidInput(f"{source}: {error}") from error.__cause__


def _resolve(job: TrainingJob, base: Path) -> JobSpec:
    spec = job.spec
    least, most = _nodes(spec.nodes)
    parallelism = _parallelism(spec.parallelism)
    chunks, stages = parallelism.pop("interleave", None), parallelism.pop("zero", None)
    _check_whole("interleave", chunks)
    _check_whole("zero", stages, 3)
    _check_batch(spec.batch, parallelism)
    return JobSpec(
        name=job.metadata.name,
        entrypoint=_entrypoint(spec.entrypoint, base),
        checkpoint=_checkpoint(spec.checkpoint, base),
        global_batch=spec.batch.global_,
        min_nodes=least,
        max_nodes=most,
        devices_per_node=spec.nodes.devices,
        micro_batch=spec.batch.micro,
        model=_model(spec.model, base) if spec.model else None,
        parallelism=parallelism,
        interleave=chunks or AxisBounds(1, 1),
        zero=stages or AxisBounds(3, 3),
        recovery=_recovery(spec.recovery),
        device_kind=spec.hardware.device,
        rack_oversubscription=spec.hardware.rack_oversubscription,
        seed=spec.seed,
        environment=_environment(spec.environment),
    )


def _nodes(keys: NodesKeys) -> tuple[int, int]:
    most = keys.min if keys.max is None else keys.max
    if most < keys.min:
        raise InvalidInput(f"spec.nodes.max ({most}) is less than spec.nodes.min ({keys.min}); raise max or lower min")
    return keys.min, most


def _parallelism(keys: ParallelismKeys) -> dict[str, AxisBounds]:
    found = {}
    for axis in type(keys).model_fields:
        given = getattr(keys, axis)
        if given is None:
            continue
        where = f"spec.parallelism.{axis}"
        if given.min > given.max:
            raise InvalidInput(f"{where}.max ({given.max}) is less than its min ({given.min}); raise max or lower min")
        if given.prefer is not None and not given.min <= given.prefer <= given.max:
            raise InvalidInput(
                f"{where}.prefer ({given.prefer}) lies outside {given.min} to {given.max}; bring it inside"
            )
        found[axis] = AxisBounds(given.min, given.max, given.prefer)
    return found


def _check_whole(name: str, given: AxisBounds | None, most: int | None = None) -> None:
    """What is no axis of the mesh has no preferred size."""
    where = f"spec.parallelism.{name}"
    if given is not None and given.prefer is not None:
        raise InvalidInput(f"{where}.prefer is not known; give its min and max")
    if given is not None and most is not None and given.min > most:
        raise InvalidInput(f"{where} ({given.min}) is more than {most}, the highest stage there is; lower it")


def _check_batch(batch: BatchKeys, parallelism: dict[str, AxisBounds]) -> None:
    if batch.micro is not None and batch.micro > batch.global_:
        raise InvalidInput(
            f"spec.batch.micro ({batch.micro}) is more than spec.batch.global ({batch.global_}); "
            "raise global or lower micro"
        )
    replicas = 1
    for axis in ("dp_replicate", "dp_shard"):
        replicas *= parallelism.get(axis, AxisBounds()).min
    if replicas > batch.global_:
        raise InvalidInput(
            f"spec.batch.global ({batch.global_}) gives no sample to some of the {replicas} data-parallel replicas "
            "that spec.parallelism demands; raise it or lower dp_replicate.min or dp_shard.min"
        )


def _entrypoint(keys: EntrypointKeys, base: Path) -> Entrypoint:
    script = base / keys.script
    mode = _mode(script, "spec.entrypoint.script")
    if mode is None or stat.S_ISDIR(mode):
        problem = "does not exist" if mode is None else "is a folder, not a file"
        raise InvalidInput(f"spec.entrypoint.script {script} {problem}; give the path of the training script")
    folder = base / (keys.working_directory or ".")
    mode = _mode(folder, "spec.entrypoint.workingDirectory")
    if mode is None or not stat.S_ISDIR(mode):
        raise InvalidInput(f"spec.entrypoint.workingDirectory {folder} is not a folder; create it or correct the path")
    return Entrypoint(str(script), tuple(keys.args), str(folder))


def _checkpoint(keys: CheckpointKeys, base: Path) -> CheckpointSpec:
    every_s, every_steps, bounds = keys.interval
    auto = AutoInterval(*bounds) if bounds else None
    return CheckpointSpec(_uri(keys.uri, base), every_s, every_steps, keys.keep.last, auto)


def _uri(uri: str, base: Path) -> str:
    """The URI as given, or the absolute path that a plain path means."""
    if not _SCHEME.match(uri):
        path = base / uri
        _check_folder(path)
        return str(path)
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise InvalidInput(f"spec.checkpoint.uri {uri[:200]!r} is no URI ({error}); write file:///folder") from error
    if parts.scheme.lower() != "file":
        raise InvalidInput(
            f"spec.checkpoint.uri {uri[:200]!r} has the scheme {parts.scheme!r}, which is not supported; "
            "use file:///folder or a path"
        )
    if parts.netloc not in {"", "localhost"} or len(parts.path) <= 1 or parts.query or parts.fragment:
        raise InvalidInput(
            f"spec.checkpoint.uri {uri[:200]!r} names no folder; write file:///folder (three slashes), or a path"
        )
    _check_folder(Path(unquote(parts.path)))
    return uri


def _check_folder(path: Path) -> None:
    if _mode(path, "spec.checkpoint.uri") is not None and not path.is_dir():
        raise InvalidInput(f"spec.checkpoint.uri {path} is not a folder; give another")


def _mode(path: Path, key: str) -> int | None:
    """File mode, or None where nothing is; raises `InvalidInput` for a path that cannot be looked at."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(f"{key} {str(path)[:300]}: {reason}; correct the path") from error


_REQUIRED = ("layers", "hidden", "heads", "ffn_hidden", "vocab", "seq_length")


def _model(keys: ModelKeys, base: Path) -> ModelSpec:
    given = keys.model_dump(exclude_none=True)
    if keys.config_json is not None:
        extra = [name for name in given if name not in {"config_json", "seq_length"}]
        if extra:
            name = ModelKeys.model_fields[extra[0]].alias
            raise InvalidInput(
                f"spec.model.{name} and spec.model.configJson say the same thing twice; keep one of them"
            )
        return _checked(read_config(base / keys.config_json, keys.seq_length))
    missing = [str(ModelKeys.model_fields[name].alias) for name in _REQUIRED if name not in given]
    if missing:
        raise InvalidInput(f"spec.model lacks {', '.join(missing)}; add them, or configJson")
    return _checked(ModelSpec(**({"kv_heads": given["heads"]} | given)))


def _checked(model: ModelSpec) -> ModelSpec:
    for name, whole, part_name, part in (
        ("hidden", model.hidden, "heads", model.heads),
        ("heads", model.heads, "kvHeads", model.kv_heads),
    ):
        if whole % part:
            raise InvalidInput(f"spec.model.{name} ({whole}) is not a multiple of {part_name} ({part}); correct one")
    return model


def _recovery(keys: RecoveryKeys) -> RecoverySpec:
    if keys.lost_after <= keys.heartbeat:
        raise InvalidInput(
            f"spec.recovery.lostAfter ({keys.lost_after:g}s) must exceed heartbeat ({keys.heartbeat:g}s); raise it"
        )
    return RecoverySpec(
        heartbeat_s=keys.heartbeat,
        lost_after_s=keys.lost_after,
        hang_after_s=keys.hang_after,
        start_within_s=keys.start_within,
        settle_s=keys.settle,
        wait_for_replacement_s=keys.wait_for_replacement,
        budgets=_budgets(keys.budgets),
    )


def _budgets(keys: BudgetsKeys) -> dict[FailureClass, Budget]:
    budgets = default_budgets()
    for kind, default in default_budgets().items():
        given = getattr(keys, kind.value)
        budgets[kind] = Budget(
            default.failures if given.failures is None else given.failures,
            default.window_s if given.window is None else given.window,
        )
    return budgets


def _environment(variables: dict[str, str]) -> tuple[tuple[str, str], ...]:
    for name in variables:
        if not _VARIABLE.fullmatch(name):
            raise InvalidInput(f"spec.environment.{name[:60]} is not a variable name; use letters, digits and '_'")
        if name.startswith("REGROW_"):
            raise InvalidInput(f"spec.environment.{name[:60]} is set by regrow itself; choose another name")
    return tuple(variables.items())
