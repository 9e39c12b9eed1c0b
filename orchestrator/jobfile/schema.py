"""The keys of a job file. What is not a key here is an error (`problems` names the nearest one that is)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, AliasGenerator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

from orchestrator.jobfile.fields import (
    LEAST_S,
    MAX_SIZE,
    MOST_S,
    Argument,
    AutoCount,
    AutoDuration,
    AutoName,
    AutoSize,
    AutoWait,
    Duration,
    Interval,
    Place,
    Size,
    Wait,
    bounds,
)


class Keys(BaseModel):
    """A mapping with camelCase keys, none but these, and no conversion of one kind of value into another."""

    model_config = ConfigDict(
        alias_generator=AliasGenerator(alias=to_camel),
        extra="forbid",
        strict=True,
        frozen=True,
        hide_input_in_errors=True,
    )


class Metadata(Keys):
    """Who the job is: a DNS-1123 label, because it names Kubernetes objects and files too."""

    name: str = Field(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")


class EntrypointKeys(Keys):
    """The training script; `{tp}` and the like in `args` take values of the plan."""

    script: Place
    args: list[Argument] = []
    working_directory: Place | None = None


class NodesKeys(Keys):
    """How many nodes the job may run on, and how many devices of each it uses (`auto`: all)."""

    min: Size = 1
    max: Size | None = None
    devices: AutoSize = None


class ModelKeys(Keys):
    """A decoder-only transformer: its sizes, or the Hugging Face `config.json` that holds them."""

    config_json: Place | None = None
    layers: Size | None = None
    hidden: Size | None = None
    heads: Size | None = None
    kv_heads: Size | None = None
    ffn_hidden: Size | None = None
    vocab: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    seq_length: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    tied_embeddings: bool | None = None
    gated_ffn: bool | None = None
    head_size: Size | None = None
    experts: Annotated[int, Field(ge=0, le=MAX_SIZE)] | None = None
    experts_per_token: Annotated[int, Field(ge=0, le=MAX_SIZE)] | None = None
    expert_hidden: Annotated[int, Field(ge=0, le=MAX_SIZE)] | None = None
    shared_hidden: Annotated[int, Field(ge=0, le=MAX_SIZE)] | None = None
    dense_layers: Annotated[int, Field(ge=0, le=MAX_SIZE)] | None = None
    expert_input: Size | None = None
    full_attention_layers: Annotated[int, Field(ge=0, le=MAX_SIZE)] | None = None


class BatchKeys(Keys):
    """Samples per optimizer step over all devices, and per micro-batch of a replica (`auto`: the planner's)."""

    global_: int = Field(alias="global", ge=1, le=1_000_000_000)
    micro: AutoCount = None


class BoundsKeys(Keys):
    """Sizes that one axis may take; `prefer` is a soft target inside them."""

    min: Size = 1
    max: Size = MAX_SIZE
    prefer: Size | None = None


Bounds = Annotated[BoundsKeys, BeforeValidator(bounds)]


def _axis(name: str) -> AliasChoices:
    return AliasChoices(name, to_camel(name))


class ParallelismKeys(Keys):
    """Bounds by axis; `2` is short for `{min: 2, max: 2}`; an axis left out is free where the model is described.

    `cp`, `ep` and `interleave` (model chunks per pipeline stage) are 1 and `zero` (what dp_shard divides) is 3 unless
    they are given.
    """

    pp: Bounds | None = None
    dp_replicate: Bounds | None = Field(default=None, validation_alias=_axis("dp_replicate"))
    dp_shard: Bounds | None = Field(default=None, validation_alias=_axis("dp_shard"))
    cp: Bounds | None = None
    tp: Bounds | None = None
    ep: Bounds | None = None
    interleave: Bounds | None = None
    zero: Bounds | None = None


class KeepKeys(Keys):
    """Which checkpoints are kept: the newest `last`."""

    last: Size = 3


class CheckpointKeys(Keys):
    """Where (`file:///folder` or a path), how often and how many checkpoints.

    `interval`: `auto`, `{min: 30s, max: 10m}` (auto within bounds), `"20 steps"` or `30s`.
    """

    uri: Place
    format: Literal["native"] = "native"
    interval: Interval = (None, None, (LEAST_S, MOST_S))
    keep: KeepKeys = KeepKeys()
    replicas: Literal[1] = 1


class BudgetKeys(Keys):
    """At most `failures` restarts per `window`."""

    failures: int | None = Field(default=None, ge=0, le=MAX_SIZE)
    window: Duration | None = None


class BudgetsKeys(Keys):
    """Restart budgets by failure class."""

    user: BudgetKeys = BudgetKeys()
    transient: BudgetKeys = BudgetKeys()
    hardware: BudgetKeys = BudgetKeys()
    unknown: BudgetKeys = BudgetKeys()


class RecoveryKeys(Keys):
    """How failures are found and answered."""

    heartbeat: Duration = 1.0
    lost_after: Duration = 10.0
    hang_after: AutoDuration = None
    start_within: Duration = 600.0
    settle: Wait = 2.0
    wait_for_replacement: AutoWait = None
    budgets: BudgetsKeys = BudgetsKeys()


class HardwareKeys(Keys):
    """Device name in the planner's catalogue (`auto`: what the nodes report), and how much the network narrows.

    `rackOversubscription` 4: all devices of a rack together reach other racks at a quarter of their adapters' speed.
    """

    device: AutoName = None
    rack_oversubscription: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] = 1.0
    peers: Literal["auto"] = "auto"


class JobKeys(Keys):
    """The job itself."""

    entrypoint: EntrypointKeys
    nodes: NodesKeys = NodesKeys()
    model: ModelKeys | None = None
    batch: BatchKeys
    parallelism: ParallelismKeys = ParallelismKeys()
    checkpoint: CheckpointKeys
    recovery: RecoveryKeys = RecoveryKeys()
    hardware: HardwareKeys = HardwareKeys()
    seed: int = Field(default=0, ge=0, lt=2**63)
    environment: dict[str, Argument] = {}


class TrainingJob(Keys):
    """A job file."""

    api_version: Literal["regrow.dev/v1alpha1"]
    kind: Literal["TrainingJob"]
    metadata: Metadata
    spec: JobKeys
