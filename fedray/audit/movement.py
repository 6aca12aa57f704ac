"""Compares what moved between neighbouring worlds (versions of the shards) with what the claim allows to move."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.audit.bounds import LARGEST_MU
from fedray.audit.finding import Finding
from fedray.audit.lab import Lab
from fedray.privacy.levels import Unit

TOLERANCE = 1e-5  # of C: another padding changes a kernel's order of adding up
_TOLERANCE_A_RECORD = 2e-7  # more for each record in a batch: its norm is a float32


def rounding(records: int) -> float:
    """Return what rounding may move a sum of so many records by, in units of C."""
    return TOLERANCE + _TOLERANCE_A_RECORD * records


@dataclass
class Movement:
    """The largest movements that were seen.

    Args:
        own: The largest movement of a gateway's own sum, over what the claim allows.
        elsewhere: How far something moved that must not, in units of C: the farthest over its tolerance.
        tolerance: Rounding that was allowed there.
        where_own: The world of the first.
        where_elsewhere: The world of the second, and what moved.
        compared: How many worlds were compared.
        leftover: That movement over its tolerance.
    """

    own: float = 0.0
    elsewhere: float = 0.0
    tolerance: float = TOLERANCE
    where_own: str = "-"
    where_elsewhere: str = "-"
    compared: int = 0
    leftover: float = 0.0

    @property
    def beyond_claims(self) -> bool:
        """Whether something moved that must not, or too far."""
        return self.own > 1 + TOLERANCE or self.leftover > 1

    def note_own(self, length: float, allowed: float, where: str, records: int = 0) -> None:
        """Note how far a gateway's own sum of so many records moved, less what rounding may add."""
        share = min((length - _TOLERANCE_A_RECORD * records) / allowed, LARGEST_MU)
        if share > self.own:
            self.own, self.where_own = share, where

    def note_elsewhere(self, length: float, tolerance: float, where: str) -> None:
        """Note how far something moved that must not."""
        if length / tolerance > self.leftover:
            self.leftover, self.where_elsewhere = length / tolerance, where
            self.elsewhere, self.tolerance = min(length, LARGEST_MU), tolerance


def distance(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Return the L2 distance of two vectors in float64; infinite when one of them is not finite."""
    found = float(np.linalg.norm(one.astype(np.float64) - other))
    return found if math.isfinite(found) else math.inf


def findings_of(lab: Lab, movement: Movement, unit: Unit, own: str, elsewhere: str) -> list[Finding]:
    """Return what the movements say of the claim and of isolation.

    Args:
        lab: The run under attack.
        movement: What moved.
        unit: Whom the claim protects.
        own: The first attack in plain words.
        elsewhere: The second attack in plain words.
    """
    both = (
        ("T4 own sum", "claims", 1 + TOLERANCE, movement.own, f"{own} Farthest: {movement.where_own}."),
        (
            "T13 isolation",
            "C",
            movement.tolerance,
            movement.elsewhere,
            f"{elsewhere} Farthest: {movement.where_elsewhere}.",
        ),
    )
    return [
        Finding(
            name=name,
            level=lab.spec.noise_level,
            unit=unit,
            adjacency=lab.adjacency,
            measure=measure,
            claim=claim,
            lower_bound=found,
            confidence=1.0,
            smallest_leak_caught=1.0,
            text=text,
        )
        for name, measure, claim, found, text in both
    ]
