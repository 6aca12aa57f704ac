"""Curves over rounds as inline SVG: no script, no font, no file beside it; readable without colour and by a screen reader."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 14, 40
_MARKED_POINTS = 40  # with more, markers would hide the line
_DRAWN_POINTS = 800


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity against rounds.

    Args:
        name: What is drawn, as the figure's caption.
        points: (round, value), rounds ascending.
        limit: A horizontal line such as a budget, and its name; None for none.
        from_zero: Whether the axis must hold 0.
    """

    name: str
    points: Sequence[tuple[int, float]]
    limit: tuple[float, str] | None = None
    from_zero: bool = False

    @property
    def description(self) -> str:
        """The curve in a sentence, for whoever cannot see it."""
        (first, start), (last, end) = self.points[0], self.points[-1]
        values = [value for _, value in self.points]
        return (
            f"{self.name} against rounds: {start:.4g} after round {first}, {end:.4g} after round {last}; smallest "
            f"{min(values):.4g}, largest {max(values):.4g}."
        )


def svg(curve: Curve) -> str:
    """Return the curve as an `<svg>` element that scales with its container."""
    rounds = [number for number, _ in curve.points]
    values = [value for _, value in curve.points] + ([curve.limit[0]] if curve.limit else [])
    ticks = nice_ticks(min([*values, 0.0] if curve.from_zero else values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    first, last = min(rounds), max(rounds)

    def x(number: float) -> float:
        share = 0.5 if last == first else (number - first) / (last - first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_grid_line(y(tick), _number(tick)) for tick in ticks]
    for tick in round_ticks(first, last):
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">round</text>'
    )
    if curve.limit is not None:
        level = y(curve.limit[0])
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT + 4}" y="{level + 14:.1f}">{escape(curve.limit[1])}</text>'  # curves rise: room here
        )
    drawn = _thinned(curve.points)
    line = " ".join(f"{x(number):.1f},{y(value):.1f}" for number, value in drawn)
    parts.append(f'<polyline class="curve" points="{line}"/>')
    if len(drawn) <= _MARKED_POINTS:
        parts += [f'<circle class="mark" cx="{x(number):.1f}" cy="{y(value):.1f}" r="3"/>' for number, value in drawn]
    label = escape(curve.description, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about `about` round numbers that span [low, high]."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    raw = (high - low) / (about - 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    return [
        round(step * index, 12) for index in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    ]


def round_ticks(first: int, last: int) -> list[int]:
    """Return whole rounds to label: the first, the last, and some between that leave room."""
    if last - first <= 1:
        return sorted({first, last})
    step = max(1, round(nice_ticks(0, last - first)[1]))
    inner = [tick for tick in range(step, last, step) if tick - first >= step / 2 and last - tick >= step / 2]
    return [first, *inner, last]


def _grid_line(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.1e}"


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    stride = math.ceil(len(points) / _DRAWN_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]
