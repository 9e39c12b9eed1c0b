from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from agents.torchrun.failure import describe, error_path, is_collective, write_error
from orchestrator import wire
from orchestrator.core.types import WorkerError

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError(
            "[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"
        ),
        RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4015"),
        RuntimeError("Gloo connectFullMesh failed with [/x/gloo/rendezvous/context.cc:1] no address"),
        dist.DistBackendError("NCCL error: remote process exited"),
        dist.DistNetworkError("Connection reset by peer"),
        dist.DistStoreError("wait timeout after 300000ms"),
    ],
)
def test_lost_peers_are_collective(error: BaseException) -> None:
    assert is_collective(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError(GLOO),
        RuntimeError("Cannot use ReduceOp.PREMUL_SUM with Gloo"),
        RuntimeError("Connection refused"),
        ConnectionRefusedError("[Errno 111] Connection refused"),
        KeyError("gloo"),
    ],
)
def test_errors_of_the_script_are_not(error: BaseException) -> None:
    assert not is_collective(error)


def raised(script: str) -> BaseException:
    with pytest.raises(Exception) as caught:
        exec(script, {"GLOO": GLOO})
    return caught.value


@pytest.mark.parametrize(
    ("script", "collective"),
    [
        ("try:\n  raise RuntimeError(GLOO)\nexcept RuntimeError as e:\n  raise ValueError('step failed') from e", True),
        ("try:\n  raise RuntimeError(GLOO)\nfinally:\n  {}['x']", True),
        ("try:\n  raise KeyError('x')\nfinally:\n  raise RuntimeError(GLOO)", False),
        ("try:\n  raise KeyError('x')\nexcept KeyError:\n  raise RuntimeError(GLOO) from None", True),
    ],
)
def test_innermost_exception_decides(script: str, collective: bool) -> None:
    assert is_collective(raised(script)) is collective


def test_a_chain_in_a_circle_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_collective(first)


def test_error_file(tmp_path: Path) -> None:
    error = describe(raised("raise ValueError('bad value')"), 5)
    write_error(tmp_path, error)
    read: WorkerError = wire.loads(error_path(tmp_path, 5).read_bytes(), WorkerError)
    assert read == error
    assert (read.exception, read.message, read.collective) == ("ValueError", "bad value", False)
    assert read.traceback.rstrip().endswith("ValueError: bad value")
    assert [path.name for path in tmp_path.iterdir()] == ["error-5.json"]
