"""The privacy loss of many equal events: dp-accounting's distribution of one event, composed with itself.

A run asks for epsilon after every round, and a round of a small model is over before the library has composed once. What
does not depend on the count, its moments, is computed once here; method and truncation are the library's (FFT, Koskela et
al. 2020; Chernoff bounds, Doroshenko et al. 2022), and so are the results, to rounding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

_TRUNCATED = 1e-15  # mass outside of the kept range; counted as infinite loss


class ComposedLoss:
    """The privacy loss of one event in one direction (a record, or gateway, added or removed), and of many events.

    Args:
        pmf: dp-accounting's probability mass function of one event's loss.
    """

    def __init__(self, pmf: Any) -> None:
        dense = pmf.to_dense_pmf()
        self._probabilities: Float64Array = np.asarray(dense._probs, np.float64)
        self._lowest = int(dense._lower_loss)  # of the grid
        self._interval = float(dense._discretization)
        self._infinite = float(dense._infinity_mass)
        positions = np.arange(len(self._probabilities))
        self._orders = np.array([*range(-20, 0), *range(1, 21)]) / len(positions)
        self._log_moments = np.log([np.exp(order * positions) @ self._probabilities for order in self._orders])

    def epsilon(self, count: int, delta: float) -> float:
        """Return the smallest epsilon ≥ 0 whose hockey-stick divergence is at most delta after `count` ≥ 1 events.

        Edge cases:
            Infinity when the loss is infinite with a probability above delta.
        """
        infinite = _TRUNCATED - math.expm1(count * math.log1p(-self._infinite))
        if infinite > delta:
            return math.inf
        first, probabilities = self._composed(count)
        decay = np.exp(-self._interval * np.arange(len(probabilities)))

        def masses_from(index: int) -> tuple[float, float]:
            """Return the mass of the losses from `index` on, and their sum of p · e^(loss at `index` − loss)."""
            tail = probabilities[index:]
            return infinite + float(tail.sum()), float(decay[: len(tail)] @ tail)

        # The divergence falls along the grid: find the first point, from a loss of 0 on, where it is at most delta.
        low, high = min(max(0, -first), len(probabilities)), len(probabilities)
        while low < high:
            middle = (low + high) // 2
            upper, lower = masses_from(middle)
            low, high = (low, middle) if upper - lower <= delta else (middle + 1, high)
        upper, lower = masses_from(low)
        if upper <= delta:  # only beyond the last point
            return max(0.0, (first + low) * self._interval)
        # Between that point and the one before it, the divergence at epsilon is upper − e^(epsilon − loss) · lower.
        return max(0.0, (first + low) * self._interval + math.log((upper - delta) / lower))

    def _composed(self, count: int) -> tuple[int, Float64Array]:
        """Return the grid's index of the first loss kept, and the probabilities from there on."""
        from scipy import fft

        size, down = len(self._probabilities), self._orders < 0
        bounds = (count * self._log_moments + math.log(2 / _TRUNCATED)) / self._orders
        low = max(0, math.floor(bounds[down].max()))
        high = min((size - 1) * count, math.ceil(bounds[~down].min()))
        length = fft.next_fast_len(max(high - low + 1, size), real=True)
        # The transform wraps around modulo its length: what lies outside of the kept range is below its mass.
        wrapped = fft.irfft(fft.rfft(self._probabilities, length) ** count, length)
        return self._lowest * count + low, np.roll(wrapped, -low)[: high - low + 1]
