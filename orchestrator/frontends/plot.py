"""The loss curve as inline SVG: the run, the undisturbed run behind it, and its incidents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 960, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 28, 44
_MOST_POINTS = 1500
"""More points than pixels only make the file larger."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line at `step`."""

    step: float
    label: str
    title: str


def loss_plot(run: Mapping[int, float], undisturbed: Mapping[int, float], marks: Sequence[Mark]) -> str:
    """An `<svg>` element; steps on the horizontal axis, loss on the vertical one."""
    finite = [loss for curve in (run, undisturbed) for loss in curve.values() if math.isfinite(loss)]
    steps = [*run, *undisturbed]
    if not finite:
        return '<p class="empty">No loss was reported.</p>'
    across = _Scale(0, max(*steps, 1), _LEFT, WIDTH - _RIGHT)
    low, high = _padded(min(finite), max(finite))
    up = _Scale(low, high, HEIGHT - _BOTTOM, _TOP)
    parts = [_axes(across, up)]
    parts += [_mark(mark, across.at(mark.step)) for mark in marks]
    if undisturbed:
        parts.append(_line(undisturbed, across, up, "undisturbed"))
    parts.append(_line(run, across, up, "run"))
    parts.append(_legend(bool(undisturbed)))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by step">{"".join(parts)}</svg>'


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Four to eight round numbers within the scale."""
        raw = (self.high - self.low) / 8
        magnitude = 10.0 ** math.floor(math.log10(raw))
        width = next(one for one in (1, 2, 5, 10) if one * magnitude >= raw * 0.999) * magnitude
        first, last = math.ceil(self.low / width - 1e-9), math.floor(self.high / width + 1e-9)
        return [number * width for number in range(first, last + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.05 or max(abs(high), 1.0) * 0.05
    return low - room, high + room


def _axes(across: _Scale, up: _Scale) -> str:
    parts = []
    for value in up.ticks():
        y = up.at(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in across.ticks():
        parts.append(f'<text x="{across.at(value):.1f}" y="{HEIGHT - 24}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    parts.append(f'<text x="{_LEFT - 8}" y="{_TOP - 12}" text-anchor="end">loss</text>')
    return "".join(parts)


def _mark(mark: Mark, x: float) -> str:
    line = f'<line class="incident" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
    label = f'<text class="incident" x="{x:.1f}" y="{_TOP - 6}" text-anchor="middle">{escape(mark.label)}</text>'
    return f"<g><title>{escape(mark.title)}</title>{line}{label}</g>"


def _line(curve: Mapping[int, float], across: _Scale, up: _Scale, kind: str) -> str:
    stride = math.ceil(len(curve) / _MOST_POINTS)
    points = sorted(curve.items())[::stride]
    known = [(across.at(step), up.at(loss)) for step, loss in points if math.isfinite(loss)]
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in known)}"/>'


def _legend(both: bool) -> str:
    entries = [("run", "this run"), ("undisturbed", "undisturbed run")][: 2 if both else 1]
    parts = []
    for number, (kind, text) in enumerate(entries):
        x, y = WIDTH - 170, _TOP + 16 + 18 * number
        parts.append(
            f'<polyline class="{kind}" points="{x},{y} {x + 28},{y}"/><text x="{x + 36}" y="{y + 4}">{text}</text>'
        )
    return "".join(parts)
