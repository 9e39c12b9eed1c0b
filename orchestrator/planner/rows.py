"""Tables of measured training runs (CSV), as `regrow plan --evaluate` takes them.

Columns, all but the first five optional; an empty cell is a missing column:

- `row_id`, `gpu` (a name that contains one of the catalogue: `A100-80G`), `n_gpus`, `gbs` (samples per step), `seq`;
  without `row_id` the line's number; names of other tools are understood, too: `num_gpus`, `seq_len`, `system`,
  `dtype`, `tp_size`, `pp_size`, `cp_size`, `ep_size`, `vp_size`, and `model` with `size` (`llama3`, `70b`)
- `model` (a known name) or `layers, hidden, heads, vocab` and, where they are not heads, 4 x hidden and no gate:
  `kv_heads, ffn_hidden, gated` (1 or 0), `tied` (1 or 0, else tied where the model is not of the Llama family)
- `tp, cp`: 1 where missing; `pp, mbs, vpp`, and `ep` of a model with experts, where missing are chosen as the fastest
  that fit, but `vpp` is 1 where a `schedule` does not say that it interleaves; the data-parallel size is what is left
  of `n_gpus`
- `fsdp`: ranks that share states (else all data-parallel ones); `zero_stage`: else 3 with `fsdp`, and without it 1, or
  3 where a whole copy does not fit
- `recompute`: `full`, `selective...`, or `none`; empty = the fastest that fits, but full for AutoModel
- `precision`: contains fp4, fp8, bf16, fp16 or fp32, and `rowwise` where each row has a scale
- `software`, and what `schedule`, `src`, `source` and `notes` tell of it: Megatron or NeMo, torchtitan (else taken for
  it), DeepSpeed (of 2022: `numbers.SOFTWARE_2022`), its month (`26.02`, `202412`), `async` for asynchronous collectives
  of `tp`; `tokendrop` there or in `model` for experts of fixed capacity
- `interconnect`: `4x100Gb/s ... per node` or `400Gb/s ... per GPU` replaces the catalogue's network; where it is empty,
  that of the rows with the same `src` and `gpu` does
- the step: `iter_time_s`, else `tokens_per_s_per_gpu`, else `tflops_per_gpu` with `tflops_kind` (`model`, or `hardware`
  where the second forward pass of full recomputation counts), else `mfu_pct` (of `peak_tflops_used`, else of
  `peak_tflops_bf16`, else of the catalogue's); `mem_gib`; `oom` (1 = it ran out of memory)
- `notes` or `task`: `LoRA` in them stands for adapters on a frozen model
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.core.errors import InvalidInput
from orchestrator.core.spec import ModelSpec
from orchestrator.planner.evaluate import Row, measured_flops
from orchestrator.planner.hardware import CATALOGUE, GIB, Machine, find
from orchestrator.planner.models import known
from orchestrator.planner.numbers import AUTOMODEL, COMPOSER, MEGATRON, MEGATRON_2022, SOFTWARE_2022, Numbers

NODE = 8
"""Devices of a node, where nothing says otherwise."""
ASYNCHRONOUS = 0.75
"""Share of the collectives of `tp` that hides behind products which take them in chunks."""
ROWWISE = 0.57
"""Rate of fp8 products with one scale per row, relative to those with one per tensor."""
LATEST = 9999
"""Year and month of software that says nothing of it."""
FLASH = 2301
"""Year and month from which Megatron and DeepSpeed are taken to use fused attention."""
OVERLAPPED = 2401
"""From which Megatron is taken to overlap collectives with computing."""
_RELEASE = re.compile(r"(?<![\d.])(?:20)?(2\d)[.-]?(0[1-9]|1[0-2])(?!\d)")
_YEAR = re.compile(r"(?<![\d.])20(2\d)(?!\d)")
_MEGATRON = re.compile(r"megatron|nemo|narayanan|korthikanti|2104\.04473|2205\.05198")
_COMPOSER = re.compile(r"llm-?foundry|mosaic|composer|\bmpt\b")
_PER_NODE = re.compile(r"(\d+)\s*x\s*(\d+)\s*Gb/s[^;,]*per node", re.IGNORECASE)
_PER_DEVICE = re.compile(r"(\d+)\s*Gb/s[^;,]*per GPU", re.IGNORECASE)


_ALSO = {"n_gpus": "num_gpus", "seq": "seq_len", "gpu": "system", "precision": "dtype", "vpp": "vp_size"} | {
    axis: f"{axis}_size" for axis in ("tp", "pp", "cp", "ep")
}
"""Names of columns in the tables of other tools."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that is well written but says nothing that can be estimated; `reason` names the line."""

    row_id: str
    reason: str


class _NotEstimated(InvalidInput):
    """An unknown model or device, or a mesh that does not divide the devices."""


def read_rows(text: str, name: str) -> list[Row | Refused]:
    """The rows of the table `text`, in order; errors call it `name`.

    Raises `InvalidInput` naming line and column where a cell cannot be read: then the table itself is wrong.
    """
    try:
        records = list(csv.DictReader(text.splitlines(), strict=True))
    except csv.Error as error:
        raise InvalidInput(f"{name} is not CSV ({error}): give a table with a header line") from error
    if not records:
        raise InvalidInput(f"{name} holds no row: give a header line and at least one measurement")
    found = [_Cells(name, number, record) for number, record in enumerate(records, start=2)]
    _share_interconnects(found)
    return [_read(cells) for cells in found]


def parse_rows(text: str, name: str) -> list[Row]:
    """The rows that can be estimated; raises `InvalidInput` as `read_rows`, and where there is none."""
    found = read_rows(text, name)
    rows = [one for one in found if isinstance(one, Row)]
    if not rows:
        raise InvalidInput("; ".join(one.reason for one in found[:1] if isinstance(one, Refused)))
    return rows


def _share_interconnects(rows: Sequence[_Cells]) -> None:
    """Rows of one `src` and `gpu` ran on one cluster: where some name its network and agree, it holds for all."""
    named: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cells in rows:
        named[cells.cluster].add(cells.text("interconnect"))
    for cells in rows:
        others = named[cells.cluster] - {""}
        if len(others) == 1:
            cells.cells["interconnect"] = min(others)


def _read(cells: _Cells) -> Row | Refused:
    try:
        return cells.row()
    except _NotEstimated as error:
        return Refused(cells.row_id, str(error))


class _Cells:
    """One line of a table."""

    def __init__(self, name: str, line: int, cells: dict[str, str | None]) -> None:
        self.cells = {
            str(name).strip(): (value or "").strip() for name, value in cells.items() if isinstance(value, str)
        }
        self.where = f"{name}, line {line}"
        self.row_id = self.text("row_id") or str(line)

    @property
    def cluster(self) -> tuple[str, str]:
        """What tells where it ran."""
        return self.text("src"), self.text("gpu")

    def text(self, name: str) -> str:
        return self.cells.get(name, "") or self.cells.get(_ALSO.get(name, name), "")

    def number(self, name: str, default: float | None = None) -> float | None:
        text = self.text(name)
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1e18:
            raise self.wrong(name, "no number of at least 0")
        return value

    def count(self, name: str, default: int | None = None) -> int | None:
        value = self.number(name, default)
        if value is None:
            return None
        if value != int(value) or value < 1:
            raise self.wrong(name, "no whole number of at least 1")
        return int(value)

    def wrong(self, name: str, what: str) -> InvalidInput:
        return InvalidInput(f"{self.where}: {name} is {self.text(name)[:40]!r}, {what}: correct it")

    def needed(self, name: str) -> int:
        value = self.count(name)
        if value is None:
            raise InvalidInput(f"{self.where}: the column {name} is missing or empty: add it")
        return value

    def row(self) -> Row:
        """What the line says."""
        model, machine = self._model(), self._machine()
        devices, batch = self.needed("n_gpus"), self.needed("gbs")
        tp, cp = self.count("tp", 1) or 1, self.count("cp", 1) or 1
        pp = self.count("pp")
        while devices // (tp * cp * (pp or 1)) > batch and devices % (2 * tp * cp * (pp or 1)) == 0:
            cp *= 2  # more ranks than samples: they can but share sequences
        if devices % (tp * cp * (pp or 1)):
            raise _NotEstimated(
                f"{self.where}: n_gpus {devices} is no multiple of tp {tp} x pp {pp or 1} x cp {cp}: correct one"
            )
        shards = int(self.number("fsdp", 0) or 0)
        schedule = self.text("schedule").lower()
        chunks = self.count("vpp") or (1 if schedule and "interleaved" not in schedule else None)
        size = self.count("mbs") or self._default_size(devices // (tp * cp), batch, pp)
        row = Row(
            row_id=self.row_id,
            model=model, machine=machine, numbers=self._numbers(), devices=devices, global_batch=batch, tp=tp, pp=pp,
            interleave=chunks, micro_batch=size,
            cp=cp, ep=self.count("ep", None if model.experts else 1), dp_shard=shards if shards > 1 else None,
            zero=self._zero(shards), recomputation=self._recomputation(),
            measured_bytes=(self.number("mem_gib") or 0) * GIB or None, out_of_memory=bool(self.number("oom", 0)),
        )  # fmt: skip
        return replace(row, measured_s=self._seconds(row))

    def _default_size(self, replicas: int, batch: int, pp: int | None) -> int | None:
        """Without `mbs`, torchtitan makes as many micro-batches of what a replica computes as there are stages."""
        if pp is None or pp == 1 or "torchtitan" not in self._told():
            return None
        return max(1, batch // max(1, replicas // pp) // pp)

    def _told(self) -> str:
        """What may name the software and its options."""
        names = ("software", "schedule", "src", "source", "notes", "precision", "model")
        return " ".join(map(self.text, names)).lower()

    def _zero(self, shards: int) -> int | None:
        stage = self.number("zero_stage", 3 if shards > 1 else None)
        if stage not in (None, 0, 1, 2, 3):
            raise self.wrong("zero_stage", "not 0, 1, 2 or 3")
        return None if stage is None else int(stage)

    def _recomputation(self) -> int | None:
        said = self.text("recompute").lower()
        if not said and "automodel" in self._told():  # as its recipes have it
            return 2
        if not said or "/" in said:
            return None
        return 2 if said.startswith("full") else 1 if said.startswith("selective") else 0

    def _model(self) -> ModelSpec:
        name, seq = " ".join(filter(None, (self.text("model"), self.text("size")))), self.count("seq")
        model = known(name)
        if model is not None and "w/ mtp" in name.lower():  # predicts one token more, with a layer of its own
            model = replace(model, layers=model.layers + 1)
        if self.text("layers") and self.text("hidden"):
            model = self._described(model, name)
        if model is None:
            raise _NotEstimated(
                f"{self.where}: the model {name[:60]!r} is not known: name one of the README's, or add the "
                "columns layers, hidden, heads and vocab"
            )
        return replace(model, seq_length=seq or model.seq_length)

    def _described(self, base: ModelSpec | None, name: str) -> ModelSpec:
        llama = "llama" in name.lower()
        hidden, heads = self.needed("hidden"), self.count("heads") or (base.heads if base else 0) or 1
        same = base is not None and (base.layers, base.hidden) == (self.count("layers"), hidden)
        if base is not None and same:
            return replace(
                base, heads=heads, kv_heads=min(base.kv_heads, heads), vocab=self.count("vocab") or base.vocab
            )
        tied = self.number("tied", 0 if llama else 1)
        return ModelSpec(
            layers=self.needed("layers"), hidden=hidden, heads=heads, kv_heads=self.count("kv_heads") or heads,
            ffn_hidden=self.count("ffn_hidden") or 4 * hidden, vocab=self.needed("vocab"),
            seq_length=self.needed("seq"), tied_embeddings=bool(tied), gated_ffn=bool(self.number("gated", 0)),
            head_size=max(1, hidden // heads),
        )  # fmt: skip

    def _machine(self) -> Machine:
        name = self.text("gpu")
        device = find(name)
        if device is None:
            raise _NotEstimated(f"{self.where}: the gpu {name[:40]!r} is not known: known are {', '.join(CATALOGUE)}")
        said, network = self.text("interconnect"), None
        if match := _PER_NODE.search(said):
            network = int(match[1]) * int(match[2]) / 8 * 1e9 / NODE
        elif match := _PER_DEVICE.search(said):
            network = int(match[1]) / 8 * 1e9
        return Machine.of(device, NODE, network)

    def _numbers(self) -> Numbers:
        said = self.text("precision").lower()
        precision = next((one for one in ("fp4", "fp8", "fp16", "fp32") if one in said.split("+")[0]), "bf16")
        adapters = "lora" in f"{self.text('notes')} {self.text('task')}".lower()
        return replace(self._software(), precision=precision, frozen=adapters)

    def _software(self) -> Numbers:
        """What computed, as far as the row tells."""
        told = self._told()
        released = _released(told)
        if "deepspeed" in told and not FLASH <= released < LATEST:
            # Gradients are summed in the type of the products, or in fp32 beside them.
            return replace(SOFTWARE_2022, gradient_bytes=6 if "bf16" in self.text("precision") else 2)
        if "automodel" in told:
            return AUTOMODEL
        if _MEGATRON.search(told):
            return _megatron(told, released)
        if _COMPOSER.search(told):
            return COMPOSER
        asynchronous = "async" in told and "vanilla" not in told
        return replace(
            Numbers(),
            tensor_overlap=ASYNCHRONOUS if asynchronous else Numbers().tensor_overlap,
            narrow=ROWWISE if "rowwise" in told else 1.0,
            fused="eager" not in told,
            logit_bytes=2 if released >= 2501 else 10,
        )

    def _seconds(self, row: Row) -> float | None:
        """The measured step."""
        tokens = row.global_batch * row.model.seq_length / row.devices
        if seconds := self.number("iter_time_s"):
            return seconds
        if rate := self.number("tokens_per_s_per_gpu"):
            return tokens / rate
        rate = self.number("tflops_per_gpu")
        if not rate and (share := self.number("mfu_pct")):
            peak = row.machine.device.peak_flops_per_s / 1e12
            rate = share / 100 * (self.number("peak_tflops_used") or self.number("peak_tflops_bf16") or peak)
        if rate:
            return tokens * measured_flops(row.model, "hardware" in self.text("tflops_kind")) / (rate * 1e12)
        return None


def _released(told: str) -> int:
    """Year and month, as 2407, of the latest release that is named; January where a year stands alone."""
    named = [int(year + month) for year, month in _RELEASE.findall(told)]
    return max(named or [int(year + "01") for year in _YEAR.findall(told)], default=LATEST)


def _megatron(told: str, released: int) -> Numbers:
    if released < OVERLAPPED:
        return replace(MEGATRON_2022, sequence_parallel=released >= 2201, fused_attention=released >= FLASH)
    dropping = "tokendrop" in told  # shapes known ahead: nothing to wait for
    return replace(MEGATRON, fused_experts=released >= 2606, routing_s=0.0 if dropping else MEGATRON.routing_s)
