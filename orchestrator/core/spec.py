"""The job as the core sees it: a job file with every default filled in, units resolved and nothing left to parse.

`orchestrator.jobfile` turns YAML, HTTP bodies and CRD specs into these.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from orchestrator.core.types import Entrypoint


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer, as far as the planner needs to know it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn_hidden: int
    vocab: int
    seq_length: int
    tied_embeddings: bool = False
    gated_ffn: bool = True
    """Three matrices in the feed-forward block (SwiGLU) instead of two."""
    head_size: int | None = None
    """Numbers per attention head; None = `hidden / heads`."""
    experts: int = 0
    """Routed experts of a mixture-of-experts layer; 0 = a dense model. Every axis `ep` divides them."""
    experts_per_token: int = 0
    expert_hidden: int = 0
    """Intermediate size of one expert; `ffn_hidden` is that of the dense layers."""
    shared_hidden: int = 0
    """Intermediate size of what every token of such a layer passes besides (shared experts)."""
    expert_input: int | None = None
    """Size that routed experts work on, where a token is brought to a smaller one first; None = `hidden`."""
    dense_layers: int = 0
    """How many of `layers` have no experts (the first ones)."""
    full_attention_layers: int | None = None
    """How many of `layers` look at every earlier token; the others see a short window or keep a state. None = all."""


@dataclass(frozen=True, slots=True)
class AxisBounds:
    """Sizes that one mesh axis may take: `min <= prefer <= max`."""

    min: int = 1
    max: int = 1_000_000
    prefer: int | None = None
    """Soft target: taken wherever it is legal and idles at most a tenth of the usable devices, else relaxed."""


class FailureClass(enum.StrEnum):
    """Who is to blame for the end of a generation; each has its own restart budget."""

    USER = "user"  # the training script raised
    TRANSIENT = "transient"  # a worker was killed or hung; the same hardware may go on
    HARDWARE = "hardware"  # a node or device was lost
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Budget:
    """At most `failures` restarts per `window_s` seconds."""

    failures: int
    window_s: float


@dataclass(frozen=True, slots=True)
class AutoInterval:
    """Bounds of an interval between checkpoints that is chosen while the job runs."""

    least_s: float = 10.0
    most_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class CheckpointSpec:
    """Where and how often checkpoints are written, and how many are kept. At most one interval is set."""

    uri: str
    every_s: float | None = None
    every_steps: int | None = None
    keep_last: int = 3
    auto: AutoInterval | None = None
    """As often as loses least, from what saves cost and how often the job fails."""


def default_budgets() -> dict[FailureClass, Budget]:
    """Restarts allowed when the job file does not say: generous for what heals by itself."""
    hour_s = 3600.0
    return {
        FailureClass.USER: Budget(3, hour_s),
        FailureClass.TRANSIENT: Budget(20, hour_s),
        FailureClass.HARDWARE: Budget(100, hour_s),
        FailureClass.UNKNOWN: Budget(10, hour_s),
    }


@dataclass(frozen=True, slots=True)
class RecoverySpec:
    """How failures are found and answered."""

    heartbeat_s: float = 1.0
    lost_after_s: float = 10.0
    """A node not heard of for this long is LOST."""
    hang_after_s: float | None = None
    """No progress for this long is a hang; None = ten times the median step, at least 30 s."""
    start_within_s: float = 600.0
    """A generation that has not completed its first step after this long has failed."""
    settle_s: float = 2.0
    """Capacity changes within this window are answered by one plan."""
    wait_for_replacement_s: float | None = None
    """How long a lost node is waited for before shrinking; None = by expected cost."""
    budgets: dict[FailureClass, Budget] = field(default_factory=default_budgets)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One training job. `min_nodes <= max_nodes`; `micro_batch` None = the planner chooses."""

    name: str
    entrypoint: Entrypoint
    checkpoint: CheckpointSpec
    global_batch: int
    min_nodes: int = 1
    max_nodes: int = 1
    devices_per_node: int | None = None
    """Devices used per node; None = all that the node has."""
    micro_batch: int | None = None
    model: ModelSpec | None = None
    parallelism: dict[str, AxisBounds] = field(default_factory=dict)
    """Bounds by axis name (`AXES`); an axis left out is free where the model is described, else 1 (dp_shard free)."""
    interleave: AxisBounds = AxisBounds(1, 1)
    """Model chunks per pipeline stage; more than 1 only for training scripts that run an interleaved schedule."""
    zero: AxisBounds = AxisBounds(3, 3)
    """What `dp_shard` may divide: 1 optimizer states, 2 gradients too, 3 parameters too (`fully_shard`)."""
    recovery: RecoverySpec = field(default_factory=RecoverySpec)
    device_kind: str | None = None
    """Name in the hardware catalogue; None = what the nodes report."""
    rack_oversubscription: float = 1.0
    """How many times thinner the network between racks is than inside them; 1 = as thick: racks do not matter."""
    seed: int = 0
    environment: tuple[tuple[str, str], ...] = ()
