"""What the orchestrator releases of a round: the average of updates, with the noise of the `gateway` level."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedray.privacy.levels import level_of
from fedray.privacy.noise import aggregate_noise
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys


def aggregate(
    spec: PrivacySpec,
    keys: RoundKeys,
    total: npt.NDArray[np.float64],
    weight: float,
    arrived: tuple[tuple[int, int], ...],
) -> npt.NDArray[np.float64]:
    """Return the average update `[P]` of a round.

    Args:
        spec: Says whether noise is added here, and the public divisor.
        keys: The round's key and attempt.
        total: `[P]`, the (weighted) sum over the gateways that arrived; clipped updates at the `gateway` level.
        weight: The sum of the weights.
        arrived: Ranges of those gateways.

    Guarantee:
        `gateway`: (sum + N(0, sigma²C²)) / expected cohort, whoever arrived; see `fedray.privacy.levels`.
        Otherwise the updates are private already and the mean is post-processing.

    Edge cases:
        Nobody arrived: pure noise at the `gateway` level, zero otherwise.
    """
    if level_of(spec).central_noise:
        return (total + aggregate_noise(spec, keys, arrived, len(total))) / spec.expected_cohort
    return total / weight if weight > 0 else np.zeros_like(total)
