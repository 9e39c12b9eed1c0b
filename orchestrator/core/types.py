"""The nouns that every layer shares: mesh, plan, assignment, generation, and what nodes report and are told.

All are frozen, slotted dataclasses of JSON-able fields, so that `orchestrator.wire` can carry them over HTTP, into the
journal and into a CRD's status unchanged. Units are in the names: `_s` seconds, `_bytes` bytes.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Mesh axes from outermost to innermost (torchtitan's order): consecutive ranks differ in `tp` first."""


@dataclass(frozen=True, slots=True, order=True)
class Mesh:
    """Sizes of the parallelism axes; `ep` reuses the ranks of `dp_shard`, `cp` and `tp`."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of `AXES`."""
        return (self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)

    @property
    def dp_degree(self) -> int:
        """Number of data-parallel replicas of the batch: `dp_replicate * dp_shard`."""
        return self.dp_replicate * self.dp_shard

    def coordinate(self, rank: int) -> dict[str, int]:
        """Position of `rank` on every axis of `AXES` (row-major: `tp` varies fastest)."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the mesh {self} of {self.world_size} ranks")
        position: dict[str, int] = {}
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, position[axis] = divmod(rank, size)
        return position

    def replica(self, rank: int) -> int:
        """Index of the data-parallel replica that `rank` belongs to, in `range(dp_degree)`."""
        position = self.coordinate(rank)
        return position["dp_replicate"] * self.dp_shard + position["dp_shard"]

    def __str__(self) -> str:
        named = [f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        if self.ep > 1:
            named.append(f"ep {self.ep}")
        return " x ".join(named) or "1 device"


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """How the samples of one global batch are divided; invariant: `sum(samples) == global_batch`.

    Replica `r` consumes `samples[r]` samples per step in `micro_batches` micro-batches of at most `micro_batch`. All
    replicas run the same number of micro-batches, so that their collectives pair up; one with fewer samples runs
    smaller ones, and what it lacks to fill them is padding of weight zero.
    """

    global_batch: int
    micro_batch: int
    micro_batches: int
    samples: tuple[int, ...]

    def rows(self, replica: int) -> int:
        """Rows of each of the replica's micro-batches, padding included; at least 1."""
        return max(1, -(-self.samples[replica] // self.micro_batches))

    def offset(self, replica: int) -> int:
        """Position of the replica's first sample inside the global batch."""
        return sum(self.samples[:replica])


class Recomputation(enum.StrEnum):
    """Which activations are computed again in the backward pass instead of kept."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Plan:
    """Mesh + batch split + recomputation, with the reason it was chosen and what it is expected to cost."""

    mesh: Mesh
    batch: BatchSplit
    recomputation: Recomputation = Recomputation.NONE
    stage_layers: tuple[int, ...] = ()
    """Transformer layers per pipeline stage; empty when the model is not described."""
    reason: str = ""
    memory_bytes: int = 0
    """Estimated peak per device; 0 when the model is not described."""
    step_s: float = 0.0
    """Estimated seconds per step; 0 when unknown."""
    interleave: int = 1
    """Model chunks per pipeline stage."""
    zero: int = 3
    """What `dp_shard` divides (ZeRO stage): 1 optimizer states, 2 gradients too, 3 parameters too."""


@dataclass(frozen=True, slots=True)
class AssignedNode:
    """Ranks `first_rank .. first_rank + devices - 1` run on `node`."""

    node: str
    first_rank: int
    devices: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """Ranks -> nodes; invariant: contiguous from rank 0 in the order of `nodes`, each node at most once."""

    nodes: tuple[AssignedNode, ...]

    def __iter__(self) -> Iterator[AssignedNode]:
        return iter(self.nodes)

    def of(self, node: str) -> AssignedNode | None:
        """The part of `node`, or None when it has no rank."""
        return next((part for part in self.nodes if part.node == node), None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes in rank order."""
        return tuple(part.node for part in self.nodes)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(part.devices for part in self.nodes)


@dataclass(frozen=True, slots=True)
class NodeCapacity:
    """What one node offers to the planner now."""

    node: str
    devices: int
    memory_bytes: int = 0
    """Memory per device; 0 when unknown."""
    kind: str = "cpu"
    """Device name in the hardware catalogue."""
    speed: float = 1.0
    """Of its devices, relative to what their kind usually does: 0.7 for a node that is throttled."""
    rack: str = ""
    """Nodes of one rack share its switch; empty = not known."""


@dataclass(frozen=True, slots=True)
class MeasuredPlan:
    """How long a step of a plan took on devices of one kind."""

    plan: Plan
    assignment: Assignment
    kind: str
    step_s: float


@dataclass(frozen=True, slots=True)
class Generation:
    """One launch of the job: `number` only ever increases, and at most one generation is live."""

    number: int
    plan: Plan
    assignment: Assignment
    checkpoint_step: int | None = None
    """Committed step that this generation restores; None = from scratch."""
    checkpoint_path: str | None = None
    """Where that checkpoint is, relative to the root."""


# ---------------------------------------------------------------- what a node reports


class WorkerState(enum.StrEnum):
    """What the agent sees of one worker process."""

    STARTING = "starting"  # forked; the training script has not reported yet
    RESTORING = "restoring"  # the training script has said hello and is building and restoring its state
    READY = "ready"  # restored, about to take its first step
    RUNNING = "running"  # has completed a step in this generation
    STOPPED = "stopped"  # alive, but stopped by a signal (SIGSTOP) or in uninterruptible sleep
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker of the generation that the node runs."""

    rank: int
    pid: int
    state: WorkerState
    exit_code: int | None = None
    """Exit status; negative = killed by that signal; None while alive."""
    step: int = 0
    """Number of completed steps of the job (a restored checkpoint of step n counts as n)."""
    idle_s: float = 0.0
    """Seconds since the worker last progressed (or since it started)."""
    ping_age_s: float = 0.0
    """Seconds since the worker's process was last heard of at all (it pings from a thread of its own)."""
    loss: float | None = None
    """Global mean loss of a step at or before `step`, on the ranks that know it."""


@dataclass(frozen=True, slots=True)
class SaveReport:
    """One rank has durably written its part of the save of `step`."""

    generation: int
    step: int
    rank: int
    part: str
    """Path of the part manifest, relative to the checkpoint root."""
    digest: str
    """xxh3-128 (hex) of the part manifest's bytes."""
    size_bytes: int
    stall_s: float
    """Seconds for which training stood still."""
    write_s: float


@dataclass(frozen=True, slots=True)
class WorkerError:
    """Why a worker failed, as its error file or exit status tells."""

    rank: int
    exception: str
    """Type name of the exception, for example `ValueError`; `signal SIGKILL` or `exit 3` when there was none."""
    message: str
    traceback: str
    step: int
    """Completed steps when it was raised."""
    time_s: float
    """Unix time at which it was raised: the earliest of a generation is the root cause."""
    collective: bool = False
    """True when it only says that a peer went away (a failed collective): never a root cause by itself."""


class LaunchState(enum.StrEnum):
    """State of the one launch that a node runs."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    PAUSED = "paused"  # all workers saved and exited because they were asked to
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"  # ended because it was ordered to


ENDED = frozenset({LaunchState.PAUSED, LaunchState.SUCCEEDED, LaunchState.FAILED, LaunchState.STOPPED})
"""States in which no process of the launch is alive."""


@dataclass(frozen=True, slots=True)
class LaunchReport:
    """The generation that a node runs or ran last."""

    generation: int
    state: LaunchState
    store: str | None = None
    """`host:port` of the generation's fresh rendezvous store, from the node that hosts it."""
    workers: tuple[WorkerReport, ...] = ()
    saves: tuple[SaveReport, ...] = ()
    """Parts written by this generation on this node and not yet known to be committed."""
    errors: tuple[WorkerError, ...] = ()
    paused_step: int | None = None


@dataclass(frozen=True, slots=True)
class Probes:
    """Host readings (psutil)."""

    cpu_percent: float = 0.0
    load_1m: float = 0.0
    memory_available_bytes: int = 0
    memory_total_bytes: int = 0
    disk_free_bytes: int = 0
    agent_rss_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A heartbeat: everything that *is* on one node, so that a lost message is healed by the next."""

    node: str
    instance: str
    """Unique per start of the agent process."""
    address: str
    """Address at which other nodes reach this one."""
    devices: int
    device_kind: str = "cpu"
    device_memory_bytes: int = 0
    warm: bool = True
    """False while the process that workers are forked from is still importing: a launch now would start late."""
    launch: LaunchReport | None = None
    probes: Probes = field(default_factory=Probes)
    rack: str = ""
    """Where it stands; empty = not known."""
    speed: float = 1.0
    """Of its devices, relative to what their kind usually does."""


# ---------------------------------------------------------------- what a node is told


@dataclass(frozen=True, slots=True)
class Entrypoint:
    """The user's training script; `{placeholders}` in `args` take values of the plan (see `expand_arguments`)."""

    script: str
    args: tuple[str, ...] = ()
    working_directory: str = "."


@dataclass(frozen=True, slots=True)
class LaunchOrder:
    """Everything a node needs to run its part of one generation."""

    job: str
    generation: Generation
    entrypoint: Entrypoint
    checkpoint_uri: str
    checkpoint_path: str | None
    """Committed checkpoint to restore, relative to the root; None = from scratch."""
    save_every_s: float | None
    """The agent of rank 0 asks its worker to save this often; None = never by time."""
    save_every_steps: int | None
    """Workers save whenever the step is a multiple of this; None = never by step."""
    store: str | None
    """Store endpoint, once the hosting node (that of rank 0) has reported it."""
    seed: int = 0
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Directive:
    """The answer to a heartbeat: what *should be* on this node. `launch` None = nothing may run."""

    generation: int
    """Newest generation that exists; whatever is older must not run any more."""
    launch: LaunchOrder | None = None
    save_request: int = 0
    """Number of the last save ordered in this generation; 0 = none."""
    pause: bool = False
    """Save at the next agreed step and exit (for a planned change: no step is lost)."""
    committed_step: int | None = None
    """Newest committed step: saves up to it need not be reported again."""
    heartbeat_s: float = 1.0


def expand_arguments(args: tuple[str, ...], plan: Plan) -> tuple[str, ...]:
    """Replace `{pp}`, `{dp_replicate}`, `{dp_shard}`, `{cp}`, `{tp}`, `{ep}`, `{world_size}`, `{micro_batch}`,
    `{micro_batches}`, `{global_batch}`, `{interleave}`, `{zero}` and `{recomputation}` in `args` by the values of
    `plan`; other braces stay as they are.
    """
    values = dict(zip(AXES, plan.mesh.sizes, strict=True)) | {
        "world_size": plan.mesh.world_size,
        "micro_batch": plan.batch.micro_batch,
        "micro_batches": plan.batch.micro_batches,
        "global_batch": plan.batch.global_batch,
        "ep": plan.mesh.ep,
        "interleave": plan.interleave,
        "zero": plan.zero,
        "recomputation": plan.recomputation.value,
    }
    expanded = []
    for arg in args:
        for name, value in values.items():
            arg = arg.replace("{" + name + "}", str(value))
        expanded.append(arg)
    return tuple(expanded)
