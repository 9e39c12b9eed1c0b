"""The elastic process of one generation on one node: rendezvous, workers, exit codes.

Order matters: the workers are forked first, from a process with one thread, and wait at a gate; only then is the store
opened (its server is a C++ thread). What they are still missing, the store's endpoint, arrives through the gate.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.events import Event, EventSource
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousParameters

from agents.torchrun.failure import error_path
from agents.torchrun.link import AgentLink
from agents.torchrun.rendezvous import BACKEND, get_handler
from agents.torchrun.worker import Forked, fork_worker
from orchestrator import wire
from orchestrator.core.types import AssignedNode, LaunchOrder, WorkerError

MONITOR_S = 0.1
"""Longest time between two looks at the workers; the death of one is noticed at once."""
ROOT_CAUSE_S = 0.2
"""How long a failed collective waits for the error that caused it, which may be that of a worker of this node."""
EXIT_BARRIER_S = 30.0
"""How long the store's host stays for the other nodes after its own workers have succeeded."""


class RegrowElasticAgent(SimpleElasticAgent):
    """Torch's elastic agent with forked workers, ranks from the assignment and no restarts of its own."""

    def __init__(self, spec: WorkerSpec, part: AssignedNode, world_size: int, link: AgentLink, launch: Launch) -> None:
        super().__init__(spec, exit_barrier_timeout=EXIT_BARRIER_S)
        self._part = part
        self._world_size = world_size
        self._link = link
        self._launch = launch
        self._alive: dict[int, Forked] = {}
        self._exit_codes: dict[int, int] = {}

    def fork_workers(self) -> None:
        """Fork all workers of this node; they wait for the rendezvous."""
        inherited = [self._link.fd]
        for local_rank in range(self._part.devices):
            rank = self._part.first_rank + local_rank
            forked = fork_worker(self._launch.order, rank, local_rank, self._launch.directory, inherited)
            inherited.append(forked.gate)
            self._alive[rank] = forked
        self._link.send(type="workers", pids={rank: forked.pid for rank, forked in self._alive.items()})

    # ------------------------------------------------------------ what torch's run loop calls

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Ranks come from the assignment: nothing to exchange."""
        first, world = self._part.first_rank, self._world_size
        return [
            Worker(local, first + local, role_rank=first + local, world_size=world, role_world_size=world)
            for local in range(spec.local_world_size)
        ]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for worker in worker_group.workers:
            with suppress(BrokenPipeError):  # it died at the gate: its exit code tells
                self._alive[worker.global_rank].release(self._environment(worker_group, worker))
        self._link.send(type="running")
        return {forked.local_rank: forked.pid for forked in self._alive.values()}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        signal.sigtimedwait({signal.SIGCHLD}, MONITOR_S)
        self._reap()
        failed = {rank: code for rank, code in self._exit_codes.items() if code != 0}
        if failed:
            self._wait_for_root_cause(failed)
            return RunResult(WorkerState.FAILED, failures={rank: self._failure(rank) for rank in failed})
        if not self._alive:
            return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(self._exit_codes))
        return RunResult(WorkerState.HEALTHY)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 0) -> None:
        """SIGKILL what is left: nobody is going to wait for a worker whose group has lost a member."""
        for forked in self._alive.values():
            with suppress(ProcessLookupError):
                os.kill(forked.pid, signal.SIGKILL)
        for rank, forked in list(self._alive.items()):
            _, status = os.waitpid(forked.pid, 0)
            self._exited(rank, status, ended_here=True)

    def _exit_barrier(self) -> None:
        """The host keeps the store until every node has ended, as far as they can still say so."""
        leave(self._store, self._worker_group.group_rank, self._worker_group.group_world_size)

    def _construct_event(self, state: str, source: EventSource, *_: Any, **__: Any) -> Event:
        """Nobody reads torch's events here, and filling them in asks DNS for this host's name each time."""
        return Event(f"torchelastic.worker.status.{state}", source=source)

    # ------------------------------------------------------------ workers

    def _environment(self, group: WorkerGroup, worker: Worker) -> dict[str, str]:
        generation = self._launch.order.generation
        return {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            **dict(self._launch.order.environment),
            "RANK": str(worker.global_rank),
            "LOCAL_RANK": str(worker.local_rank),
            "WORLD_SIZE": str(worker.world_size),
            "LOCAL_WORLD_SIZE": str(self._part.devices),
            "GROUP_RANK": str(group.group_rank),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "ROLE_NAME": group.spec.role,
            "ROLE_RANK": str(worker.role_rank),
            "ROLE_WORLD_SIZE": str(worker.role_world_size),
            "MASTER_ADDR": group.master_addr,
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_RUN_ID": self._launch.order.job,
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            "REGROW_ORDER": str(self._launch.order_path),
            "REGROW_SOCKET": str(self._launch.socket),
            "REGROW_GENERATION": str(generation.number),
            "REGROW_MESH": json.dumps(asdict(generation.plan.mesh)),
        }

    def _reap(self) -> None:
        for rank, forked in list(self._alive.items()):
            pid, status = os.waitpid(forked.pid, os.WNOHANG)
            if pid:
                self._exited(rank, status)

    def _exited(self, rank: int, status: int, *, ended_here: bool = False) -> None:
        code = os.waitstatus_to_exitcode(status)
        del self._alive[rank]
        self._exit_codes[rank] = code
        self._link.send(type="exit", rank=rank, code=code, time_s=time.time(), ended_here=ended_here)

    def _wait_for_root_cause(self, failed: dict[int, int]) -> None:
        """A worker that lost a dying peer may be gone before the peer is."""
        deadline = time.monotonic() + ROOT_CAUSE_S
        while self._alive and all(self._is_collective(rank) for rank in failed) and time.monotonic() < deadline:
            signal.sigtimedwait({signal.SIGCHLD}, deadline - time.monotonic() if deadline > time.monotonic() else 0)
            self._reap()
            failed.update({rank: code for rank, code in self._exit_codes.items() if code != 0})

    def _is_collective(self, rank: int) -> bool:
        try:
            error: WorkerError = wire.loads(error_path(self._launch.directory, rank).read_bytes(), WorkerError)
        except OSError:
            return False
        return error.collective

    def _failure(self, rank: int) -> ProcessFailure:
        return ProcessFailure(rank - self._part.first_rank, pid=0, exitcode=self._exit_codes[rank], error_file="")


def leave(store: Any, node_rank: int, nodes: int, timeout_s: float = EXIT_BARRIER_S) -> None:
    """Say that this node has ended; the host (rank 0) waits for all others, at most `timeout_s`."""
    with suppress(RuntimeError):  # the host is gone: nobody is left to tell
        store.set_timeout(timedelta(seconds=5))
        store.set(f"left/{node_rank}", "1")
        keys = [f"left/{other}" for other in range(1, nodes)]
        deadline = time.monotonic() + timeout_s
        while node_rank == 0 and keys and not store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.02)


class Launch:
    """What the agent left for one launch in `directory`."""

    def __init__(self, directory: Path, socket: Path) -> None:
        self.directory = directory
        self.socket = socket
        self.order_path = directory / "order.json"
        self.order: LaunchOrder = wire.loads(self.order_path.read_bytes(), LaunchOrder)


def run(directory: Path, socket: Path, node: str, address: str) -> NoReturn:
    """Run the part of `node` in the launch of `directory`, report it to the agent and end the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    launch = Launch(directory, socket)
    link = AgentLink(socket, launch.order.generation.number)
    try:
        state = _run(launch, link, node, address)
        link.send(type="result", state=state)
    except Exception as error:
        traceback.print_exc()
        link.send(
            type="result",
            state="failed",
            exception=type(error).__name__,
            message=str(error),
            traceback=traceback.format_exc(),
            collective=isinstance(error, dist.DistError),
            time_s=time.time(),
        )
    sys.stderr.flush()
    os._exit(0)


def _run(launch: Launch, link: AgentLink, node: str, address: str) -> str:
    assignment = launch.order.generation.assignment
    part = assignment.of(node)
    assert part is not None, f"{node} has no rank in generation {launch.order.generation.number}"
    handler = get_handler()(
        RendezvousParameters(
            backend=BACKEND,
            endpoint="",
            run_id=launch.order.job,
            min_nodes=len(assignment.nodes),
            max_nodes=len(assignment.nodes),
            local_addr=address,
            generation=launch.order.generation.number,
            node_rank=assignment.names.index(node),
            publish=lambda endpoint: link.send(type="store", endpoint=endpoint),
            wait_for_endpoint=lambda: str(link.receive()["endpoint"]),
        )
    )
    spec = WorkerSpec(
        role="worker",
        local_world_size=part.devices,
        rdzv_handler=handler,
        entrypoint=launch.order.entrypoint.script,
        max_restarts=0,
        monitor_interval=0.001,  # _monitor_workers itself waits
    )
    agent = RegrowElasticAgent(spec, part, assignment.world_size, link, launch)
    agent.fork_workers()
    result = agent.run()
    if result.is_failed():
        leave(agent._store, assignment.names.index(node), 1)
    return "failed" if result.is_failed() else "succeeded"
