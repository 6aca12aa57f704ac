"""Two seams of the mechanism: how a vector is brought into its ball, and how the noise varies over rounds and steps.

Whatever is plugged in here, claims stay true by construction: `fedray.privacy.clipping` shows a rule one norm at a time and
takes no factor that leaves the ball; `fedray.privacy.noise` takes no scale below the least one, which is what is charged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from fedray.errors import InputError

if TYPE_CHECKING:  # settings read this module, and do without torch
    import torch


@runtime_checkable
class Clipping(Protocol):
    """How much of a vector is kept."""

    def factor(self, norm: torch.Tensor, clip_norm: float) -> torch.Tensor:
        """Return what a vector is multiplied by, `[]`, float32.

        Args:
            norm: `[]`, its L2 norm; a number of at most 1e18.
            clip_norm: C, the radius of the ball that it must end in.

        Guarantee:
            Whatever it returns: a factor that leaves the ball is cut to one that does not, and one that is negative or no
            number counts as zero. It sees no other vector's norm, so that none can speak in it.
        """
        ...


@dataclass(frozen=True)
class FixedClipping:
    """Vectors longer than C are scaled down to C, others are kept (Abadi et al. 2016)."""

    def factor(self, norm: torch.Tensor, clip_norm: float) -> torch.Tensor:
        """Return min(1, C/norm)."""
        return (clip_norm / norm).clamp(max=1.0)


@runtime_checkable
class NoiseShape(Protocol):
    """How the noise of a release compares with sigma·C."""

    @property
    def least(self) -> float:
        """No scale is smaller; the accountant charges every release as one with noise of least·sigma·C."""
        ...

    def scale(self, round_index: int, step: int) -> float:
        """Return the standard deviation of the noise over sigma·C, the same for every coordinate.

        Args:
            round_index: From 1.
            step: Local step from 0; 0 for the noise on a sum of updates.

        Guarantee:
            A scale below `least`, or that is no number, counts as `least`: epsilon is never below the truth. Where scales
            are larger it is above.
        """
        ...


@dataclass(frozen=True)
class IndependentNoise:
    """Fresh noise of one size everywhere.

    Args:
        least: Over sigma·C.
    """

    least: float = 1.0

    def scale(self, round_index: int, step: int) -> float:
        """Return the same for all."""
        return self.least


def noise_scale(shape: NoiseShape, round_index: int, step: int) -> float:
    """Return a shape's scale, never below its least one."""
    scale = float(shape.scale(round_index, step))
    return max(scale, shape.least) if math.isfinite(scale) else shape.least


@dataclass(frozen=True)
class HeldShape:
    """A shape whose least scale is held: the accountant and the noise read the same, whatever the shape says later.

    Args:
        least: As it was when the run was planned.
        shape: Gives the scales.
    """

    least: float
    shape: NoiseShape

    def scale(self, round_index: int, step: int) -> float:
        """Return the shape's scale."""
        return self.shape.scale(round_index, step)


def held_shape(shape: NoiseShape, name: str) -> NoiseShape:
    """Return a shape with its least scale held, which must be a positive number.

    Args:
        shape: To check.
        name: The value of --noise-shape.

    Raises:
        InputError: It is none.
    """
    least = shape.least
    if isinstance(least, bool) or not isinstance(least, int | float) or not 1e-3 <= least <= 1e6:
        raise InputError(f"--noise-shape {name}: least is {least!r}; it must be a number between 0.001 and 1e6.")
    return shape if isinstance(shape, IndependentNoise) else HeldShape(float(least), shape)
