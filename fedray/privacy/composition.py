"""The privacy loss of many equal events: one event's loss on a grid, composed with itself by Fourier transforms.

The method is that of Koskela et al. (2020) and Doroshenko et al. (2022), with two changes. The distribution is tilted towards
the losses that decide at delta: the transform's rounding, some 1e-16, is then relative to delta. And the grid follows the
composed loss: rounding one event's loss adds a variance whose effect on epsilon after `count` events is known beforehand, so
the grid is as coarse as epsilon's precision allows. Few or rare events with large losses take a few hundred points, a million
events some 100,000; a grid of a fixed share of one event's spread would take gigabytes there.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import numpy.typing as npt
from fedray.privacy.loss import MASS_OUTSIDE, PrivacyLoss

Float64Array = npt.NDArray[np.float64]

_PRECISION = 3e-4  # of epsilon: what a grid is chosen for
_ACCEPTED = 1e-3  # where a grid that was chosen for another epsilon is finer than that, it is kept
_MOST_POINTS = 2**21  # of one event's loss
_OUTSIDE = 1e-14  # mass of the tilted distribution outside of the range
_LARGEST_EXPONENT = 600.0  # what lies beyond is nothing, or certainly too much; denormal numbers would be slow
_SMALLEST_MODE = 1e-30  # of a spectrum; the transform's rounding is 1e-16
_FADED = 40.0  # a loss so much larger than epsilon counts whole
_SLACK = 1e-9  # relative; above what rounding takes off delta elsewhere
_TRANSFORM_NOISE = 1e-14  # for each event; above what rounding in a transform takes off a sum of tilted probabilities
_KEPT = 4  # grids


class ComposedLoss:
    """The privacy loss of many equal events in one direction.

    Args:
        loss: Of one event.
    """

    def __init__(self, loss: PrivacyLoss) -> None:
        self._loss = loss
        self._grids: OrderedDict[float, tuple[int, Float64Array]] = OrderedDict()
        losses = loss.losses
        self._log_weights = np.log(loss.weights)
        spread = math.sqrt(loss.weights @ losses**2)
        most = float(np.abs(losses).max())
        self._orders = np.geomspace(1e-6 / most, 1e4 / spread, 1 + math.ceil(math.log(1e10 * most / spread) / 0.14))
        exponents = np.outer(self._orders, losses) + self._log_weights
        peaks = exponents.max(1)
        tilted = np.exp(exponents - peaks[:, None])
        sums = tilted.sum(1)
        self._log_moments = peaks + np.log(sums)
        self._means = tilted @ losses / sums

    def epsilon(self, count: int, delta: float) -> float:
        """Return epsilon ≥ 0 after `count` ≥ 1 events at delta: never below the truth, and at most some 0.1 % above it.

        Edge cases:
            One event has an exact value. 0 where delta covers everything.
        """
        if count == 1:
            return self._loss.epsilon(delta)
        if count * self._loss.divergence(0.0) <= delta:
            return 0.0
        guess = float(((count * self._log_moments - math.log(delta)) / self._orders).min())
        hazard = 0.0
        while True:
            tilt = self._tilt(count, guess)
            interval = self._interval(count, guess, tilt, max(hazard, self._orders[tilt]) if hazard == 0 else hazard, _PRECISION)
            found, hazard = self._on_grid(interval, count, delta, float(self._orders[tilt]))
            if not 0.0 < found < guess:
                return min(found, guess)
            if interval <= self._interval(count, found, self._tilt(count, found), hazard, _ACCEPTED):
                return found
            guess = found

    def _tilt(self, count: int, epsilon: float) -> int:
        """Return the index of the order under which the composed loss is about epsilon in the mean."""
        return min(int(np.searchsorted(count * self._means, epsilon)), len(self._orders) - 1)

    def _interval(self, count: int, epsilon: float, tilt: int, hazard: float, precision: float) -> float:
        """Return the largest power of two on whose grid epsilon is about as precise as wanted.

        Rounding a loss between two multiples adds the variance (loss − lower)(upper − loss); with the mean that goes up by half of
        it, the log moment at `order` grows by order (order + 1) / 2 times as much, and epsilon by that over the order.
        """
        losses = self._loss.losses
        exponents = self._orders[tilt] * losses + self._log_weights
        tilted = np.exp(exponents - exponents.max())
        tilted /= tilted.sum()
        allowed = 2 * precision * epsilon / (1 + hazard)

        def fits(exponent: int) -> bool:
            interval = 2.0**exponent
            share = losses / interval
            share = share - np.floor(share)
            added = count * float(tilted @ (share * (1 - share))) * interval**2
            return interval * hazard <= 0.5 and max(added, interval**2 / 4) <= allowed

        low = math.ceil(math.log2((losses[-1] - losses[0]) / _MOST_POINTS))
        high = max(low, math.floor(math.log2(epsilon)) - 2)
        while high > low and not fits(high):
            high -= 1
        return 2.0**high

    def _rounded(self, interval: float) -> tuple[int, Float64Array]:
        """Return one event's loss on a grid, which several counts may share: the lowest multiple, and log probabilities."""
        if interval not in self._grids:
            lowest, probabilities = self._loss.on_grid(interval)
            with np.errstate(divide="ignore"):
                self._grids[interval] = lowest, np.log(probabilities)
            while len(self._grids) > _KEPT:
                self._grids.popitem(last=False)
        self._grids.move_to_end(interval)
        return self._grids[interval]

    def _on_grid(self, interval: float, count: int, delta: float, order: float) -> tuple[float, float]:
        """Return epsilon after `count` events of the loss on a grid, and the hazard rate of the composed loss there."""
        lowest, log_probabilities = self._rounded(interval)
        log_one = log_probabilities + order * interval * np.arange(lowest, lowest + len(log_probabilities))
        log_moment = _log_sum(log_one)
        first, tilted = _composed(log_one - log_moment, count)
        loss_of_first = lowest * count + first  # in units of the interval
        exponents = count * log_moment - order * interval * (loss_of_first + np.arange(len(tilted)))
        infinite = count * MASS_OUTSIDE + _OUTSIDE * math.exp(min(exponents[-1], _LARGEST_EXPONENT))
        delta = delta / (1 + _SLACK)
        if infinite > delta:
            return math.inf, 0.0
        noise = _TRANSFORM_NOISE * count * np.exp(np.minimum(exponents, _LARGEST_EXPONENT))
        exponents = np.where(exponents < -_LARGEST_EXPONENT, -np.inf, np.minimum(exponents, _LARGEST_EXPONENT))
        masses = tilted * np.exp(exponents)
        upper_masses = infinite + np.append(np.cumsum(masses[::-1])[::-1], 0.0)
        upper_masses[:-1] += noise
        decay = np.exp(-interval * np.arange(min(len(tilted), int(_FADED / interval) + 1)))

        def masses_from(index: int) -> tuple[float, float]:
            """Return the mass of the losses from `index` on, and their sum of p · e^(loss at `index` − loss)."""
            near = masses[index : index + len(decay)]
            return float(upper_masses[index]), float(decay[: len(near)] @ near)

        # The divergence falls along the grid: find the first point, from a loss of 0 on, where it is at most delta.
        low, high = min(max(0, -loss_of_first), len(tilted)), len(tilted)
        while low < high:
            middle = (low + high) // 2
            upper, lower = masses_from(middle)
            low, high = (low, middle) if upper - lower <= delta else (middle + 1, high)
        loss = (loss_of_first + low) * interval
        upper, lower = masses_from(low)
        nearby = max(1, round(min(loss, 1 / order) / interval / 4))
        hazard = float(upper_masses[max(low - nearby, 0)] - upper_masses[min(low + nearby, len(tilted))])
        hazard /= 2 * nearby * interval * max(upper, delta)
        if upper > delta and low > 0:  # otherwise it holds at this point; what lies before the range is not known
            # Between this point and the one before it, the divergence at epsilon is upper − e^(epsilon − loss) · lower.
            loss += math.log((upper - delta) / lower)
        return max(0.0, loss), hazard


def _log_sum(exponents: Float64Array) -> float:
    peak = float(exponents.max())
    return peak + math.log(float(np.exp(exponents - peak).sum()))


def _composed(log_one: Float64Array, count: int) -> tuple[int, Float64Array]:
    """Return the distribution of the sum of `count` positions, and the first position that it holds.

    What lies above the range has a mass of at most `_OUTSIDE`, and is left out; what lies below is added within it.
    """
    from scipy import fft

    one = np.exp(log_one)
    positions = np.arange(len(one))
    mean = float(one @ positions)
    deviation = math.sqrt(max(float(one @ (positions - mean) ** 2), 1e-12) * count)
    top = (len(one) - 1) * count

    def bound(theta: float) -> float:
        """Return how far from the mean the sum lies with probability `_OUTSIDE` at most (Chernoff)."""
        return (count * _log_sum(log_one + theta * (positions - mean)) - math.log(_OUTSIDE)) / theta

    # The best bound is a normal's at first; where few large positions decide, its order is some 1 / position.
    thetas = 8 / deviation * 2.0 ** -np.arange(3 + max(4, math.ceil(math.log2(len(one) / deviation))))
    first = min(max(0, math.floor(count * mean + max(bound(-theta) for theta in thetas))), top)
    last = max(first, min(top, math.ceil(count * mean + min(bound(theta) for theta in thetas))))
    length = fft.next_fast_len(max(last - first + 1, len(one)), real=True)
    # The transform wraps around modulo its length, which adds what lies outside of the range: too much, if anything.
    spectrum = fft.rfft(one, length)
    matters = np.abs(spectrum) > _SMALLEST_MODE ** (1 / count)
    composed = np.zeros_like(spectrum)
    composed[matters] = spectrum[matters] ** count
    wrapped = fft.irfft(composed, length)
    return first, np.roll(wrapped, -(first % length))[: last - first + 1]
