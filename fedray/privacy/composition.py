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

from fedray.privacy.loss import PrivacyLoss

Float64Array = npt.NDArray[np.float64]

_PRECISION = 1e-4  # of epsilon: what a grid is chosen for
_ACCEPTED = 3e-4  # where a grid that was chosen for another epsilon is finer than that, it is kept
_MOST_POINTS = (
    2**21
)  # of a loss; reached only where delta is all but the whole total variation, and epsilon next to nothing
_OUTSIDE = 1e-14  # mass of the tilted distribution outside of the range
_LARGEST_EXPONENT = 600.0  # what lies beyond is nothing, or certainly too much; denormal numbers would be slow
_SMALLEST_MODE = 1e-30  # of a spectrum; the transform's rounding is 1e-16
_FADED = 40.0  # a loss so much larger than epsilon counts whole
_SLACK = 1e-9  # relative; above what rounding takes off delta elsewhere
_TRANSFORM_NOISE = 1e-15  # for each event; above what rounding in a transform takes off a sum of tilted probabilities
_KEPT = 4  # grids
_HALVINGS = 40
_MOST_GRIDS = 8
_ORDER_STEP = 0.14  # of the logarithm of orders
_NEGLIGIBLE = 1e-7
_ENDS_APART = 4


class ComposedLoss:
    """The privacy loss of many equal events in one direction.

    Args:
        loss: Of one event.
    """

    def __init__(self, loss: PrivacyLoss) -> None:
        self._loss = loss
        self._grids: OrderedDict[tuple[float, int, int], tuple[int, Float64Array]] = OrderedDict()
        losses = loss.losses
        self._log_weights = np.log(loss.weights)
        spread = math.sqrt(loss.weights @ losses**2)
        most = float(np.abs(losses).max())
        smallest, largest = 1e-6 / most, 1e4 / spread
        self._orders = np.geomspace(smallest, largest, 1 + math.ceil(math.log(largest / smallest) / _ORDER_STEP))
        exponents = np.outer(self._orders, losses) + self._log_weights
        peaks = exponents.max(1)
        tilted = np.exp(exponents - peaks[:, None])
        sums = tilted.sum(1)
        self._log_moments = peaks + np.log(sums)
        self._means = tilted @ losses / sums
        self._variances = np.maximum(tilted @ losses**2 / sums - self._means**2, 0.0)

    def epsilon(self, count: int, delta: float) -> float:
        """Return epsilon ≥ 0 after `count` ≥ 1 events at delta: never below the truth, and at most some 0.1 % above it.

        Edge cases:
            One event has an exact value. 0 where delta covers everything.
        """
        if count == 1:
            return self._loss.epsilon(delta)
        if count * self._loss.divergence(0.0) <= delta:
            return 0.0
        epsilon = self._estimate(count, delta)
        order = hazard = self._tilt(count, epsilon)
        found = math.inf
        for _ in range(_MOST_GRIDS):
            ends = self._ends(count, delta, order)
            interval = self._interval(count, epsilon, order, hazard, ends, _PRECISION)
            last, (epsilon, hazard, noise) = found, self._on_grid(interval, ends, count, delta, order)
            found = min(found, epsilon)
            if not 0.0 < epsilon < last:
                break
            used, order = order, self._tilt(count, epsilon)
            if interval <= self._interval(count, epsilon, order, hazard, ends, _ACCEPTED) and (
                noise <= _ACCEPTED * epsilon or abs(order - used) < 0.1 * used
            ):
                break
        return found

    def _estimate(self, count: int, delta: float) -> float:
        """Return roughly what epsilon is: the saddle-point approximation of delta is right for some order's mean."""
        orders, deviations = self._orders, np.sqrt(count * self._variances)
        means = count * self._means
        share = deviations / (1 + orders * deviations) / (1 + (orders + 1) * deviations) / math.sqrt(2 * math.pi)
        with np.errstate(divide="ignore"):
            log_deltas = count * self._log_moments - orders * means + np.log(share)
        fits = np.flatnonzero((log_deltas <= math.log(delta)) & (means > 0))
        chernoff = float(((count * self._log_moments - math.log(delta)) / orders).min())
        return min(chernoff, float(means[fits[0]])) if len(fits) else chernoff

    def _tilt(self, count: int, epsilon: float) -> float:
        """Return the order under which the composed loss is about epsilon in the mean."""
        above = int(np.searchsorted(count * self._means, epsilon))
        if not 0 < above < len(self._orders):
            return float(self._orders[min(above, len(self._orders) - 1)])
        low, high = float(self._orders[above - 1]), float(self._orders[above])
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            mean = count * float(self._tilted(middle) @ self._loss.losses)
            if abs(mean - epsilon) < 0.02 * epsilon:
                return middle
            low, high = (middle, high) if mean < epsilon else (low, middle)
        return low

    def _tilted(self, order: float) -> Float64Array:
        """Return the probabilities of one event's losses under an order."""
        exponents = order * self._loss.losses + self._log_weights
        tilted = np.exp(exponents - exponents.max())
        return np.asarray(tilted / tilted.sum())

    def _ends(self, count: int, delta: float, order: float) -> tuple[int, int]:
        """Return between which of one event's losses a grid is needed.

        Above, an infinite loss makes next to no difference to delta; below, the lowest loss makes none to the log moment.
        """
        loss = self._loss
        exponents = order * loss.losses + self._log_weights
        log_moment = _log_sum(exponents)
        with np.errstate(over="ignore"):
            moved = count * loss.below * np.exp(np.minimum(order * loss.ends - log_moment, _LARGEST_EXPONENT))
        first = int(np.searchsorted(moved > _NEGLIGIBLE, True)) - 1
        last = int(np.searchsorted(-count * loss.above, -_NEGLIGIBLE * delta))
        step = _ENDS_APART  # few different grids
        return max(first // step * step, 0), min(-(-last // step) * step, len(loss.ends) - 1)

    def _interval(
        self, count: int, epsilon: float, order: float, hazard: float, ends: tuple[int, int], precision: float
    ) -> float:
        """Return the largest interval, of four an octave, on whose grid epsilon is about as precise as wanted.

        Rounding a loss between two multiples adds the variance (loss − lower)(upper − loss), and half of it to the mean. Where
        delta falls at the rate `hazard`, `count` times that moves epsilon by (1 + hazard) / 2 of it.
        """
        losses, tilted = self._loss.losses, self._tilted(order)
        allowed = 2 * precision * epsilon / (1 + hazard)

        def fits(exponent: int) -> bool:
            interval = 2.0 ** (exponent / 4)
            share = losses / interval
            share = share - np.floor(share)
            added = count * float(tilted @ (share * (1 - share))) * interval**2
            return bool(interval * hazard <= 0.5 and max(added, interval**2 / 4) <= allowed)

        deviation = math.sqrt(count * max(float(tilted @ losses**2) - float(tilted @ losses) ** 2, 0.0))
        most = max(float(np.diff(self._loss.ends[list(ends)])[0]), 8 * deviation)
        low = math.ceil(4 * math.log2(max(most, 1e-6 * epsilon) / _MOST_POINTS))
        found = max(low, math.floor(4 * math.log2(epsilon)) - 8)
        while found > low and not fits(found):
            found = max(low, found - 4)
        while fits(found + 1) and 2.0 ** ((found + 1) / 4) < epsilon / 4:
            found += 1
        return float(2.0 ** (found / 4))

    def _rounded(self, interval: float, ends: tuple[int, int]) -> tuple[int, Float64Array]:
        """Return one event's loss on a grid, which several counts may share: the lowest multiple, and log probabilities."""
        key = (interval, *ends)
        if key not in self._grids:
            lowest, probabilities = self._loss.on_grid(interval, *ends)
            with np.errstate(divide="ignore"):
                self._grids[key] = lowest, np.log(probabilities)
            while len(self._grids) > _KEPT:
                self._grids.popitem(last=False)
        self._grids.move_to_end(key)
        return self._grids[key]

    def _on_grid(
        self, interval: float, ends: tuple[int, int], count: int, delta: float, order: float
    ) -> tuple[float, float, float]:
        """Return epsilon after `count` events on a grid, the hazard rate of the composed loss there, and noise's share."""
        lowest, log_probabilities = self._rounded(interval, ends)
        log_one = log_probabilities + order * interval * np.arange(lowest, lowest + len(log_probabilities))
        log_moment = _log_sum(log_one)
        first, tilted = _composed(log_one - log_moment, count)
        loss_of_first = lowest * count + first  # in units of the interval
        exponents = count * log_moment - order * interval * (loss_of_first + np.arange(len(tilted)))
        infinite = count * float(self._loss.above[ends[1]])
        infinite += _OUTSIDE * math.exp(min(exponents[-1], _LARGEST_EXPONENT))
        delta = delta / (1 + _SLACK)
        if infinite > delta:
            return math.inf, 0.0, 0.0
        factors = np.exp(np.minimum(exponents, _LARGEST_EXPONENT))
        factors[exponents < -_LARGEST_EXPONENT] = 0.0
        masses = tilted * factors
        upper_masses = infinite + np.append(np.cumsum(masses[::-1])[::-1], 0.0)
        # Summed by parts, rounding in tail sums weighs 1 − e^(epsilon − loss) as it grows: 1 / (1 + order) in all.
        noise = np.append(_TRANSFORM_NOISE * count / (1 + order) * factors, 0.0)
        rise = -np.expm1(-interval * np.arange(min(len(tilted), int(_FADED / interval) + 1)))

        def divergence(index: int) -> float:
            """Return the hockey-stick divergence where epsilon is the loss at this index."""
            near = masses[index : index + len(rise)]
            return float(rise[: len(near)] @ near + upper_masses[index + len(near)] + noise[index])

        # It falls along the grid: find the first point, from a loss of 0 on, where it is at most delta.
        low, high = min(max(0, -loss_of_first), len(tilted)), len(tilted)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if divergence(middle) <= delta else (middle + 1, high)
        epsilon, upper = (loss_of_first + low) * interval, float(upper_masses[low])
        nearby = max(1, round(min(epsilon, 1 / order) / interval / 4))
        hazard = float(upper_masses[max(low - nearby, 0)] - upper_masses[min(low + nearby, len(tilted))])
        hazard /= 2 * nearby * interval * max(upper, delta)
        near = masses[low : low + len(rise)]
        lower = float((1 - rise[: len(near)]) @ near)  # the mass from here on under Q, in units of e^-epsilon
        if lower <= 0 or low == 0:  # what lies before the range is not known
            return max(0.0, epsilon), hazard, 0.0
        # Between this point and the one before it the divergence is divergence(low) + lower · (1 − e^(epsilon − loss)).
        epsilon += math.log1p(-min((delta - divergence(low)) / lower, 0.5))
        return max(0.0, epsilon), hazard, float(noise[low]) / lower


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

    def reach(sign: int) -> float:
        """Return how far from the mean the sum lies with probability `_OUTSIDE` at most (Chernoff), on one side."""
        best = math.inf
        # The best order is a normal's at first; where few large positions decide, it is some 1 / position. One minimum.
        for halvings in range(3 + max(4, math.ceil(math.log2(len(one) / deviation)))):
            theta = 8 / deviation / 2**halvings
            log_moment = count * _log_sum(log_one + sign * theta * (positions - mean))
            found = (log_moment - math.log(_OUTSIDE)) / theta
            if found > best:
                break
            best = found
        return best

    first = min(max(0, math.floor(count * mean - reach(-1))), top)
    last = max(first, min(top, math.ceil(count * mean + reach(1))))
    length = fft.next_fast_len(max(last - first + 1, len(one)), real=True)
    # The transform wraps around modulo its length, which adds what lies outside of the range: too much, if anything.
    spectrum = fft.rfft(one, length)
    matters = np.abs(spectrum) > _SMALLEST_MODE ** (1 / count)
    composed = np.zeros_like(spectrum)
    composed[matters] = spectrum[matters] ** count
    wrapped = fft.irfft(composed, length)
    return first, np.roll(wrapped, -(first % length))[: last - first + 1]
