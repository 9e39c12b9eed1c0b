"""Every refusal says what is wrong and the smallest change that would help."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from orchestrator.core.spec import AxisBounds, JobSpec
from orchestrator.core.types import NodeCapacity
from orchestrator.planner.hardware import GIB
from orchestrator.planner.memory import USABLE
from tests.unit.planner.jobs import EXAMPLE, LLAMA_70B, LLAMA_405B, infeasible, job, nodes, planned


@pytest.mark.parametrize(
    ("spec", "capacity", "reason", "needs"),
    [
        (job(min_nodes=1), [], "0 nodes with devices are available but the job needs 1", "1 more node"),
        (job(min_nodes=4), nodes(2), "2 nodes with devices are available but the job needs 4", "2 more nodes"),
        (job(), [NodeCapacity("a", 0)], "0 nodes with devices", "1 more node"),
        (job(tp=2, pp=2), nodes(3), "the smallest legal mesh (pp 2 x tp 2) needs 4 devices", "1 more device"),
        (job(tp=3), nodes(4), "tp 3 does not divide heads 8", "tp that allows 1 or 2 or 4"),
        (job(tp=AxisBounds(8, 16)), nodes(16), "tp of at least 8 is more than the model allows", "1 or 2 or 4"),
        (job(pp=9), nodes(16), "pp of at least 9 is more than the model allows", "5 or 6 or 7 or 8"),
        (job(dp_shard=8, global_batch=4), nodes(8), "a batch of 4 cannot feed 8", "spec.batch.global of at least 8"),
        (job(cp=3), nodes(4), "cp 3 does not divide seq_length 128", "cp that allows 1"),
        (job(ep=2), nodes(4), "the model has no experts", "ep that allows 1"),
        (
            job(device_kind="h999"),
            nodes(4),
            "'h999' is not in the catalogue",
            "auto or one of cpu, ",
        ),
        (
            job(None, global_batch=2, min_nodes=3),
            nodes(4),
            "no legal mesh uses between 3",
            "spec.batch.global of at least 3",
        ),
    ],
)
def test_reason_and_need(spec: JobSpec, capacity: list[NodeCapacity], reason: str, needs: str) -> None:
    answer = infeasible(spec, capacity)
    assert reason in answer.reason
    assert needs in answer.needs
    assert answer.needs in answer.reason


def test_nodes_that_cannot_train_together_are_told() -> None:
    answer = infeasible(job(None, min_nodes=3), nodes(2) + nodes(1, 1, "h100", first=3))
    assert "fewer than 3 nodes (spec.nodes.min) have devices that can train together" in answer.reason
    assert answer.needs == "spec.nodes.min 1"


def test_a_change_that_would_not_be_enough_is_not_named() -> None:
    answer = infeasible(job(dp_shard=8, global_batch=4), nodes(4))
    assert "a batch of 4 cannot feed 8 data-parallel replicas" in answer.reason
    assert answer.needs.startswith("spec.parallelism.dp_shard that allows ")
    spec = job(LLAMA_405B, tp=8, pp=4, global_batch=64)
    small = infeasible(spec, nodes(3, 8, "h100"))
    assert "the smallest legal mesh (pp 4 x tp 8) needs 32 devices" in small.reason
    more = re.fullmatch(r"(\d+) more nodes", small.needs)  # one would be enough devices, but not enough memory
    assert more is not None
    assert planned(spec, nodes(3 + int(more[1]), 8, "h100"))
    assert infeasible(spec, nodes(2 + int(more[1]), 8, "h100"))


def test_the_missing_devices_are_enough() -> None:
    spec = job(tp=2, pp=2)
    assert infeasible(spec, nodes(3)).needs == "1 more device"
    assert planned(spec, nodes(4)).plan.mesh.world_size == 4


def test_nodes_beyond_the_maximum_are_pointed_at() -> None:
    answer = infeasible(job(tp=4, max_nodes=2), nodes(4))
    assert "or raise spec.nodes.max (2)" in answer.reason


def test_too_little_memory_names_devices_that_would_do() -> None:
    spec = job(LLAMA_70B, global_batch=1024)
    answer = infeasible(spec, nodes(1, 8, "h100"))
    assert " of 80 GiB may be filled" in answer.reason
    assert answer.needs == "2 more nodes"
    assert infeasible(spec, nodes(2, 8, "h100"))
    assert any("needs" in item.reason for item in answer.rejected)
    assert planned(spec, nodes(3, 8, "h100")).plan.memory_bytes <= USABLE * 80 * GIB


def test_too_little_memory_that_no_number_of_devices_heals() -> None:
    answer = infeasible(job(replace(EXAMPLE, hidden=65536), tp=1), nodes(2, 1, "cpu", GIB // 2))
    assert answer.needs.startswith("devices with ")
