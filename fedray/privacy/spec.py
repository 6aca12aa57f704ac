"""The public constants of a private run: the one owner of sigma, C, q, B and L.

Sampler, mechanism and accountant all read them here, so that what is charged is what happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedray.privacy.shapes import Clipping, FixedClipping, IndependentNoise, NoiseShape

NoiseLevelName = Literal["none", "batch", "sample", "gateway"]
WeightsName = Literal["uniform", "records"]


@dataclass(frozen=True, kw_only=True)
class PrivacySpec:
    """Public constants only; nothing here is computed from private data.

    Args:
        noise_level: Which law of `fedray.privacy.levels` holds.
        noise_multiplier: sigma, unitless; the noise has standard deviation sigma·C.
        clip_norm: C, the L2 bound of what is clipped (a record's gradient, a batch's gradient or an update).
        delta: Of every (epsilon, delta) pair.
        batch_size: B, the public divisor of a local step.
        sample_rate: q in (0, 1], the chance of each record to be in a batch; one value for all gateways.
        local_steps: L, local steps a round.
        expected_cohort: The public divisor of the `gateway` level's sum.
        weights: How updates are averaged; "records" reveals record counts and makes the adjacency zero-out.
        participation: Poisson rate of gateways in a round.
        arrival_may_depend_on_data: Gateways may be dropped (--on-failure drop), so that who arrives may tell something.
        clipping: How vectors are brought into the ball of radius C.
        noise_shape: How noise varies over rounds and steps.
    """

    noise_level: NoiseLevelName
    noise_multiplier: float
    clip_norm: float
    delta: float
    batch_size: int
    sample_rate: float
    local_steps: int
    expected_cohort: float
    weights: WeightsName = "uniform"
    participation: float = 1.0
    arrival_may_depend_on_data: bool = False
    clipping: Clipping = FixedClipping()
    noise_shape: NoiseShape = IndependentNoise()

    @property
    def constants(self) -> dict[str, Any]:
        """The numbers and names among the constants, by name."""
        return {name: value for name, value in self.__dict__.items() if name not in ("clipping", "noise_shape")}

    @property
    def charged_multiplier(self) -> float:
        """The noise multiplier that the accountant charges: sigma times the least scale of the noise's shape."""
        return self.noise_multiplier * self.noise_shape.least

    @property
    def noise_std(self) -> float:
        """sigma·C, the standard deviation of the noise added to a clipped sum."""
        return self.noise_multiplier * self.clip_norm
