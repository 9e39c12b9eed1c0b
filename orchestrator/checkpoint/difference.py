"""Two checkpoints of any formats, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.numbers import numbers
from orchestrator.checkpoint.stream import Limits, Progress, bands
from orchestrator.checkpoint.view import UniversalView


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How a tensor differs between two checkpoints; equal where `same`."""

    name: str
    state: str | None
    """Optimizer state; None = the value itself."""
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    differing: int = 0
    """Elements whose values differ; not a number equals not a number."""
    largest_absolute: float = 0.0
    largest_relative: float = 0.0
    """|a - b| / max(|a|, |b|)."""

    @property
    def same(self) -> bool:
        """Whether shape, dtype and every value are equal."""
        return self.shapes[0] == self.shapes[1] and self.dtypes[0] == self.dtypes[1] and self.differing == 0

    @property
    def words(self) -> str:
        """The difference in a few words."""
        if self.shapes[0] != self.shapes[1]:
            return f"shape {list(self.shapes[0])} and {list(self.shapes[1])}"
        parts = [f"dtype {self.dtypes[0]} and {self.dtypes[1]}"] if self.dtypes[0] != self.dtypes[1] else []
        if self.differing:
            parts.append(
                f"{self.differing} elements differ, by at most {self.largest_absolute:.3g} absolute and "
                f"{self.largest_relative:.3g} relative"
            )
        return ", ".join(parts) or "equal"


@dataclass(frozen=True, slots=True)
class Difference:
    """All differences between the checkpoints A and B."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]
    """Those in both."""
    described: tuple[str, ...]
    """What else differs: step, aliases, parameter groups. Sentences."""

    @property
    def same(self) -> bool:
        """Whether the two hold the same training state."""
        return not (self.only_a or self.only_b or self.described) and all(one.same for one in self.tensors)


def compare(a: UniversalView, b: UniversalView, *, limits: Limits, progress: Progress) -> Difference:
    """Compare every tensor that both have, with bounded memory; raises what reading raises.

    An alias of one is compared with the tensor that the other may hold in its place.
    """
    shared = [name for name in a.tensors if name in b.tensors]
    with ThreadPoolExecutor(limits.threads) as pool:
        found = tuple(pool.map(lambda name: _tensor(a, b, name, limits.block_bytes, progress), shared))
    return Difference(
        tuple(name for name in a.tensors if name not in b.tensors and name not in b.aliases),
        tuple(name for name in b.tensors if name not in a.tensors and name not in a.aliases),
        found,
        tuple(_described(a, b)),
    )


def _tensor(a: UniversalView, b: UniversalView, name: str, block_bytes: int, progress: Progress) -> TensorDifference:
    one, other = a.tensors[name], b.tensors[name]
    shapes, dtypes = (one.shape, other.shape), (one.dtype, other.dtype)
    if one.shape != other.shape:
        return TensorDifference(name, one.state, shapes, dtypes)
    differing, absolute, relative = 0, 0.0, 0.0
    most = max(1, block_bytes // max(one.item_bytes, other.item_bytes, 8))
    for box in bands(Box.whole(one.shape), most) if Box.whole(one.shape).elements else ():
        first, second = _read(a, name, box), _read(b, name, box)
        progress(first.nbytes)
        if one.dtype == other.dtype and np.array_equal(first, second):
            continue
        count, largest, ratio = _measure(numbers(first, one.dtype), numbers(second, other.dtype))
        differing, absolute, relative = differing + count, max(absolute, largest), max(relative, ratio)
    return TensorDifference(name, one.state, shapes, dtypes, differing, absolute, relative)


def _read(view: UniversalView, name: str, box: Box) -> Any:
    out = np.empty(box.elements * view.tensors[name].item_bytes, np.uint8)
    view.read(name, box, out)
    return out


def _measure(first: Any, second: Any) -> tuple[int, float, float]:
    """Differing elements, largest absolute and largest relative difference."""
    kind = np.complex128 if "c" in (first.dtype.kind, second.dtype.kind) else np.float64
    with np.errstate(all="ignore"):
        unequal = (first != second) & ~(np.isnan(first) & np.isnan(second))
        if not unequal.any():
            return 0, 0.0, 0.0
        x, y = first[unequal].astype(kind), second[unequal].astype(kind)
        gap = np.abs(x - y)
        gap[np.isnan(gap)] = np.inf  # one of them is not a number
        scale = np.maximum(np.abs(x), np.abs(y))
        ratio = np.where(np.isfinite(scale) & (scale > 0), gap / scale, np.inf)
    return int(unequal.sum()), float(gap.max()), float(ratio.max())


def _described(a: UniversalView, b: UniversalView) -> Iterator[str]:
    if a.step != b.step:
        yield f"step {a.step} and {b.step}"
    if a.aliases != b.aliases:
        yield f"aliases {_short(a.aliases)} and {_short(b.aliases)}"
    if a.frozen != b.frozen:
        yield f"frozen parameters {_short(sorted(a.frozen))} and {_short(sorted(b.frozen))}"
    groups_a, groups_b = a.state.get("param_groups", []), b.state.get("param_groups", [])
    if len(groups_a) != len(groups_b):
        yield f"{len(groups_a)} and {len(groups_b)} parameter groups"
        return
    for index, (one, other) in enumerate(zip(groups_a, groups_b, strict=True)):
        for key in sorted(one.keys() | other.keys(), key=str):
            x, y = _comparable(one.get(key)), _comparable(other.get(key))
            if x != y:
                yield f"parameter group {index}: {key} {_short(x)} and {_short(y)}"


def _comparable(value: Any) -> Any:
    return [_comparable(one) for one in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
