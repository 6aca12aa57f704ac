"""How a cost grows: local exponents between neighbouring sizes, and a sentence on where it is linear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Doubling the size costs 1.87 to 2.14 times as much within these.
LINEAR = (0.9, 1.1)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size and what it cost: seconds of a round, cold start, memory, and the round's phases."""

    size: int
    round_s: float
    cold_start_s: float
    driver_peak_mb: float
    tree_peak_mb: float
    phases: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return dict(self.__dict__)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points over one axis, such as gateways; all else is held fixed."""

    axis: str
    fixed: str
    points: tuple[Point, ...]

    def exponents(self) -> list[float]:
        """Return k of cost ~ size^k between neighbours: 0 costs nothing more, 1 is linear."""
        return [
            math.log(after.round_s / before.round_s) / math.log(after.size / before.size)
            for before, after in pairwise(self.points)
        ]

    def sentences(self) -> list[str]:
        """Say for each stretch whether seconds a round grow linearly."""
        return [
            f"{before.size:,} → {after.size:,} {self.axis}: seconds a round × {after.round_s / before.round_s:.3g} for "
            f"size × {after.size / before.size:.3g}, exponent {exponent:.2f}: {describe(exponent)}."
            for (before, after), exponent in zip(pairwise(self.points), self.exponents(), strict=True)
        ]


def describe(exponent: float) -> str:
    """Return what an exponent means in words."""
    low, high = LINEAR
    if exponent < -0.05:
        return "falls"
    if exponent < low:
        return "less than linear"
    return "linear" if exponent <= high else "more than linear"
