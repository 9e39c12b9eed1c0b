"""What DeepSpeed's universal files say of how a tensor is cut over tensor-parallel ranks when it is loaded."""

from __future__ import annotations

from typing import Any

from orchestrator.checkpoint.expressions import compiled
from orchestrator.checkpoint.formats.torch_pickle import Instance
from orchestrator.checkpoint.unpickle import Name
from orchestrator.core.errors import CheckpointError

SUB_PARAMETERS = "parameter_with_sub_params"
_SHAPE = Name("deepspeed.checkpoint.universal_checkpoint", "SubparamShape")


def sharding(info: Any, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Members of the file beside `param`, by the patterns of `universal_checkpoint_info` (None = there is none).

    Raises `CheckpointError` for patterns that are none.
    """
    if not isinstance(info, dict):
        return {"cat_dim": 0}
    found: dict[str, Any] = {}
    if _matches(info, "tp_replicated_parameter_patterns", name) or _matches(
        info, "parameter_to_average_patterns", name
    ):
        pass
    elif _matches(info, "parameter_with_2_sub_params_cat_dim_0", name):
        found = {"cat_dim": 0, "param_n_sub_params": 2}
    elif (given := _sub_parameters(info, name)) is not None:
        found = {"sub_param_shape": Instance(_SHAPE, _sections(info, given, name, shape))}
    else:
        found = {"cat_dim": 1 if _matches(info, "parameter_with_row_parallelism_patterns", name) else 0}
    if _matches(info, "vocabulary_parameter_patterns", name):
        found["vocab_tensor"] = True
    return found


def _matches(info: dict[str, Any], key: str, name: str) -> bool:
    return any(_match(pattern, name) for pattern in info.get(key) or ())


def _sub_parameters(info: dict[str, Any], name: str) -> dict[str, Any] | None:
    for given in info.get(SUB_PARAMETERS) or ():
        if isinstance(given, dict) and any(_match(pattern, name) for pattern in given.get("patterns", ())):
            return given
    return None


def _sections(info: dict[str, Any], given: dict[str, Any], name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The attributes of a `SubparamShape`; before version 0.4 a number stood for so many sections of equal size."""
    dim, sizes = given.get("partition_dim", 0), _tuples(given.get("shape", []))
    if type(dim) is not int or not isinstance(sizes, tuple) or not 0 <= dim < min(len(sizes), len(shape)):
        raise CheckpointError(f"universal_checkpoint_info does not say how {name} of shape {list(shape)} is divided")
    count, version = sizes[dim], info.get("universal_checkpoint_version", 0.0)
    if isinstance(count, int) and isinstance(version, int | float) and version < 0.4:
        if count < 1 or shape[dim] % count:
            raise CheckpointError(f"{name} of shape {list(shape)} has no {count} equal sections along {dim}")
        sizes = (*sizes[:dim], (shape[dim] // count,) * count, *sizes[dim + 1 :])
    return {"patterns": list(given.get("patterns", [])), "shape": sizes, "partition_dim": dim}


def _match(pattern: Any, name: str) -> bool:
    if not isinstance(pattern, str):
        raise CheckpointError(f"universal_checkpoint_info has {pattern!r} where a regular expression is expected")
    return compiled(pattern).match(name) is not None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
