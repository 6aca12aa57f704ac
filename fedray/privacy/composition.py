"""The privacy loss of many equal events: dp-accounting's distribution of one event, composed with itself.

A run asks for epsilon after every round, on the cores that train, and rounds of a small model take little longer than one
composition by the library. Here what does not depend on the count, the moments, is computed once. The method is the
library's, a Fourier transform over a range that Chernoff bounds give (Koskela et al. 2020; Doroshenko et al. 2022), but of
the distribution tilted towards the losses that decide at delta: the transform's rounding, some 1e-16, is then relative to
delta, where the library's is absolute and drowns a delta below 1e-12.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

_OUTSIDE = 1e-15  # mass of the tilted distribution outside of the range
_LARGEST_EXPONENT = 600.0  # what lies beyond is nothing, or certainly too much; denormal numbers would be slow
_SMALLEST_MODE = 1e-30  # of a spectrum; the transform's rounding is 1e-16
_FADED = 100.0  # a loss so much larger than epsilon counts whole


class ComposedLoss:
    """The privacy loss of one event in one direction (a record, or gateway, added or removed), and of many events.

    Args:
        pmf: dp-accounting's probability mass function of one event's loss.
    """

    def __init__(self, pmf: Any) -> None:
        dense = pmf.to_dense_pmf()
        self._probabilities: Float64Array = np.asarray(dense._probs, np.float64)
        self._lowest = int(dense._lower_loss)  # in units of the interval
        self._interval = float(dense._discretization)
        self._infinite = float(dense._infinity_mass)
        self._positions = np.arange(len(self._probabilities))
        orders = np.geomspace(5e-3, 500.0, 41) / len(self._positions)
        self._orders = np.concatenate((-orders[::-1], orders))
        self._log_moments = np.log([np.exp(order * self._positions) @ self._probabilities for order in self._orders])

    def epsilon(self, count: int, delta: float) -> float:
        """Return the smallest epsilon ≥ 0 whose hockey-stick divergence is at most delta after `count` ≥ 1 events.

        Edge cases:
            Infinity when the loss is infinite with a probability above delta.
        """
        infinite = -math.expm1(count * math.log1p(-self._infinite))
        positive = self._orders > 0
        # The order of the best Chernoff bound at delta: tilted by it, losses about epsilon are the likely ones.
        bounds = (count * self._log_moments[positive] - math.log(delta)) / self._orders[positive]
        tilt = int(np.argmin(bounds)) + int(np.argmax(positive))
        order, log_moment = float(self._orders[tilt]), count * float(self._log_moments[tilt])
        first, tilted = self._composed(count, tilt)
        exponents = log_moment - order * (first + np.arange(len(tilted)))
        infinite += _OUTSIDE * math.exp(min(exponents[-1], _LARGEST_EXPONENT))
        if infinite > delta:
            return math.inf
        exponents = np.where(exponents < -_LARGEST_EXPONENT, -np.inf, np.minimum(exponents, _LARGEST_EXPONENT))
        probabilities = tilted * np.exp(exponents)
        upper_masses = infinite + np.append(np.cumsum(probabilities[::-1])[::-1], 0.0)
        decay = np.exp(-self._interval * np.arange(min(len(tilted), int(_FADED / self._interval) + 1)))
        loss_of_first = self._lowest * count + first  # in units of the interval

        def masses_from(index: int) -> tuple[float, float]:
            """Return the mass of the losses from `index` on, and their sum of p · e^(loss at `index` − loss)."""
            near = probabilities[index : index + len(decay)]
            return float(upper_masses[index]), float((decay[: len(near)] * near).sum())

        # The divergence falls along the grid: find the first point, from a loss of 0 on, where it is at most delta.
        low, high = min(max(0, -loss_of_first), len(tilted)), len(tilted)
        while low < high:
            middle = (low + high) // 2
            upper, lower = masses_from(middle)
            low, high = (low, middle) if upper - lower <= delta else (middle + 1, high)
        loss = (loss_of_first + low) * self._interval
        upper, lower = masses_from(low)
        if upper <= delta or low == 0:  # it holds at this point; what lies before the range is not known
            return max(0.0, loss)
        # Between this point and the one before it, the divergence at epsilon is upper − e^(epsilon − loss) · lower.
        return max(0.0, loss + math.log((upper - delta) / lower))

    def _composed(self, count: int, tilt: int) -> tuple[int, Float64Array]:
        """Return the tilted distribution of the sum of `count` positions, and the first position that it holds."""
        from scipy import fft

        order, log_moment = self._orders[tilt], self._log_moments[tilt]
        others = np.arange(len(self._orders)) != tilt
        shifts = self._orders[others] - order
        bounds = (count * (self._log_moments[others] - log_moment) + math.log(2 / _OUTSIDE)) / shifts
        top = (len(self._positions) - 1) * count
        first = min(max(0, math.floor(bounds[shifts < 0].max())), top)
        above = bounds[shifts > 0]
        last = max(first, min(top, math.ceil(above.min()))) if len(above) else top
        tilted = self._probabilities * np.exp(order * self._positions - log_moment)
        length = fft.next_fast_len(max(last - first + 1, len(tilted)), real=True)
        # The transform wraps around modulo its length, which adds what lies outside of the range: too much, if anything.
        spectrum = fft.rfft(tilted, length)
        matters = np.abs(spectrum) > _SMALLEST_MODE ** (1 / count)
        composed = np.zeros_like(spectrum)
        composed[matters] = spectrum[matters] ** count
        wrapped = fft.irfft(composed, length)
        return first, np.maximum(np.roll(wrapped, -(first % length))[: last - first + 1], 0.0)
