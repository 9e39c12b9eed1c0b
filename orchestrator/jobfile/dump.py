"""`JobSpec` -> job file, for handing a resolved job on: `parse(dump(spec), base) == spec` for any `base`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml
from pydantic.alias_generators import to_camel

from orchestrator.core.spec import CheckpointSpec, JobSpec, RecoverySpec


def dump(spec: JobSpec) -> str:
    """YAML with every value spelled out and every path absolute."""
    body: dict[str, Any] = {
        "entrypoint": {
            "script": spec.entrypoint.script,
            "args": list(spec.entrypoint.args),
            "workingDirectory": spec.entrypoint.working_directory,
        },
        "nodes": {"min": spec.min_nodes, "max": spec.max_nodes, "devices": spec.devices_per_node or "auto"},
        "batch": {"global": spec.global_batch, "micro": spec.micro_batch or "auto"},
        "parallelism": {
            axis: _given(asdict(bounds))
            for axis, bounds in {**spec.parallelism, "interleave": spec.interleave, "zero": spec.zero}.items()
        },
        "checkpoint": {
            "uri": spec.checkpoint.uri,
            "interval": _interval(spec.checkpoint),
            "keep": {"last": spec.checkpoint.keep_last},
        },
        "recovery": _recovery(spec.recovery),
        "hardware": {"device": spec.device_kind or "auto", "rackOversubscription": spec.rack_oversubscription},
        "seed": spec.seed,
        "environment": dict(spec.environment),
    }
    if spec.model is not None:
        body["model"] = {to_camel(name): value for name, value in _given(asdict(spec.model)).items()}
    whole = {"apiVersion": "regrow.dev/v1alpha1", "kind": "TrainingJob", "metadata": {"name": spec.name}, "spec": body}
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)


def _given(mapping: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}


def _duration(seconds: float) -> str:
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def _interval(checkpoint: CheckpointSpec) -> Any:
    if checkpoint.every_steps is not None:
        return f"{checkpoint.every_steps} steps"
    if checkpoint.every_s is not None:
        return _duration(checkpoint.every_s)
    auto = checkpoint.auto
    return "auto" if auto is None else {"min": _duration(auto.least_s), "max": _duration(auto.most_s)}


def _recovery(recovery: RecoverySpec) -> dict[str, Any]:
    patience_s = recovery.wait_for_replacement_s
    return {
        "heartbeat": _duration(recovery.heartbeat_s),
        "lostAfter": _duration(recovery.lost_after_s),
        "hangAfter": "auto" if recovery.hang_after_s is None else _duration(recovery.hang_after_s),
        "startWithin": _duration(recovery.start_within_s),
        "settle": _duration(recovery.settle_s),
        "waitForReplacement": "auto" if patience_s is None else _duration(patience_s),
        "budgets": {
            kind.value: {"failures": budget.failures, "window": _duration(budget.window_s)}
            for kind, budget in recovery.budgets.items()
        },
    }
