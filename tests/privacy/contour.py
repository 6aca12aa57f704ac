"""An accountant of another kind, to hold fedray's against: no grid and no Fourier transform of a distribution.

delta(epsilon) = (1/pi) · integral over t ≥ 0 of Re[e^(n K(s) − s epsilon) / (s (s + 1))], s = c + it, for any c > 0, where K is
the cumulant function of one event's loss (Zhu et al. 2022; Alghamdi et al. 2023). K is summed by Gauss–Legendre over panels:
the range of outputs is cut where the tilted density may still be large, and the trapezoidal rule would be off there by half a
step's share. What is left out are digits: results are good to some 1e-6, in either direction.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_PANEL = 0.5  # of outputs
_PHASE = 6.0  # radians of the integrand of K within a panel; sixteen nodes have ten digits up to eight
_BLOCK = 2**19  # complex numbers at a time
_MOST_WORK = 1e8  # nodes times points: some ten seconds
_FEWEST_DIGITS = 1e8  # how much larger than delta the integral's terms may be


class OutOfReachError(Exception):
    """The integral would take too long, or have too few digits: few events with rare, large losses."""


class Contour:
    """One event's loss in one direction, "remove", "add" or "replace", without outputs less likely than `least`."""

    def __init__(self, sigma: float, rate: float, direction: str, least: float = 1e-30) -> None:
        self._sigma, self._rate, self._direction = sigma, rate, direction
        # Outputs less likely than that would decide the moments of some distributions, and nothing else.
        highest = -NormalDist().inv_cdf(least)
        self._ends = (-13.0, highest if direction == "add" else highest + 1 / sigma)

    def spread(self, count: int) -> float:
        """Return the standard deviation of the loss of `count` events."""
        _, losses, weights = self._losses(self._ends, 0.0)
        return math.sqrt(count * float(weights @ (losses - weights @ losses) ** 2))

    def epsilon(self, count: int, delta: float, near: float, sharpness: float = 20.0) -> float:
        """Return epsilon at delta, which must lie within half of `near`: that only says where to integrate.

        Args:
            count: Of events.
            delta: Positive.
            near: About what epsilon is.
            sharpness: What bounds the work: delta is smoothed over this fraction of the scale on which it falls.

        Raises:
            OutOfReachError: It cannot be computed, or is not near `near`.
        """
        delta_at = self.delta_near(count, near, sharpness)
        step = min(0.02 * near, self.spread(count))
        while not delta_at(near - step) > delta >= delta_at(near + step):
            step *= 2  # as little as possible: far from `near`, rounding would be larger than delta
            if step > near / 2:
                raise OutOfReachError
        low, high = near - step, near + step
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
        if delta_at.terms(high) > _FEWEST_DIGITS * delta:
            raise OutOfReachError
        return high

    def settled_epsilon(self, count: int, delta: float, near: float) -> float:
        """Return epsilon at delta, to 1e-6 of it: smoothed over half the scale it hardly changes.

        Raises:
            OutOfReachError: It cannot be computed, or is not near `near`.
        """
        for sharpness in (20.0, 5.0):
            try:
                found = self.epsilon(count, delta, near, sharpness)
            except OutOfReachError:
                continue
            # Smoothing is wrong in the fourth order: at twice the sharpness, by a sixteenth.
            if abs(found - self.epsilon(count, delta, near, sharpness / 2)) > 1e-5 * found:
                break
            return found
        raise OutOfReachError

    def delta_near(self, count: int, near: float, sharpness: float = 20.0) -> _Integral:
        """Return delta(epsilon) after `count` events, for epsilons about `near`."""
        all_outputs, losses, weights = self._losses(self._ends, 0.0)
        c = self._saddle(losses, weights, count, near)
        exponents = np.log(weights) + c * losses
        tilted = np.exp(exponents - exponents.max())
        tilted /= tilted.sum()
        deviation = math.sqrt(count * float(tilted @ (losses - tilted @ losses) ** 2))
        matters = np.flatnonzero(exponents > exponents.max() - 46)  # 1e-20 of it
        kept = self._ends[0] if matters[0] == 0 else float(all_outputs[matters[0]])
        outputs = kept, self._ends[1] if matters[-1] == len(weights) - 1 else float(all_outputs[matters[-1]])
        left_out = sum(
            float(self._losses(ends, 0.0)[2].sum())
            for ends in ((self._ends[0], outputs[0]), (outputs[1], self._ends[1]))
            if ends[0] < ends[1]
        )
        span = float(np.ptp(losses[matters]))
        jumps = float(np.ptp(losses[exponents > exponents.max() - 30]))
        window = sharpness * max(c, 1 / near)
        # Within a panel the integrand turns a few times at most; that of a nearly normal loss fades before it turns.
        width = 3 / (deviation + jumps + (near if deviation < 30 * jumps else 0.0))
        start, work, all_t, widths, values = 0.0, 0.0, [], [], []
        while start < 5 * window:
            narrow = max(c, start) / 2  # the pole at 0 is c away
            edges = start + (np.array([0.0, narrow]) if narrow < width else width * np.arange(33))
            t = (edges[:-1, None] + np.diff(edges)[:, None] * (_NODES + 1) / 2).ravel()
            work += len(t) * len(_NODES) * (float(np.ptp(outputs)) / _PANEL + float(t[-1]) * span / _PHASE)
            if work > _MOST_WORK:
                raise OutOfReachError
            cumulants = count * self._cumulant(c + 1j * t, outputs, left_out)
            all_t.append(t)
            widths.append(np.outer(np.diff(edges), _WEIGHTS / 2).ravel())
            values.append(cumulants)
            if float(values[-1].real.max()) < float(values[0].real.max()) - 35:
                break
            start = float(edges[-1])
        t = np.concatenate(all_t) / window
        # A normal window smooths delta; these two together, but for the fourth order.
        weights = np.concatenate(widths) * (4 * np.exp(-(t**2) / 2) - np.exp(-2 * t**2)) / 3
        return _Integral(c + 1j * t * window, weights, np.concatenate(values))

    def _losses(self, ends: tuple[float, float], frequency: float) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Return outputs, their losses and probabilities: enough of them for the mean of e^(i · frequency · loss)."""
        rough = np.linspace(*ends, 4001)
        log_upper, log_lower = self._log_ratios(rough)
        progress = rough / _PANEL + frequency / _PHASE * (log_upper - log_lower)  # the loss grows with the output
        panels = math.ceil(float(np.ptp(progress)))
        edges = np.interp(np.linspace(*progress[[0, -1]], panels + 1), progress, rough)
        widths = np.diff(edges)[:, None]
        y = (edges[:-1, None] + widths * (_NODES + 1) / 2).ravel()
        log_upper, log_lower = self._log_ratios(y)
        shares = (widths * _WEIGHTS / 2).ravel() / math.sqrt(2 * math.pi)
        return y, log_upper - log_lower, np.exp(log_upper - y * y / 2) * shares

    def _log_ratios(self, y: Float64Array) -> tuple[Float64Array, Float64Array]:
        """Return both worlds' densities over that of N(0, 1), in the worlds as they are usually written."""
        m, rate = 1 / self._sigma, self._rate

        def log_mixture(mean: float) -> Float64Array:
            exponent = y * mean - mean**2 / 2
            small = np.log1p(rate * np.expm1(np.minimum(exponent, 1.0)))
            return np.where(exponent < 1, small, np.logaddexp(math.log1p(-rate), math.log(rate) + exponent))

        zero = np.zeros_like(y)
        return (
            zero if self._direction == "add" else log_mixture(m),
            zero if self._direction == "remove" else log_mixture(-m),
        )

    @staticmethod
    def _saddle(losses: Float64Array, weights: Float64Array, count: int, near: float) -> float:
        """Return the c > 0 at which n K(c) − c epsilon is smallest."""
        low, high = 1e-9 / near, 1e16
        for _ in range(100):
            middle = math.sqrt(low * high)
            tilted = weights * np.exp(middle * losses - (middle * losses).max())
            low, high = (middle, high) if count * float(tilted @ losses) < near * float(tilted.sum()) else (low, middle)
        return low

    def _cumulant(
        self, s: npt.NDArray[np.complex128], ends: tuple[float, float], left_out: float
    ) -> npt.NDArray[np.complex128]:
        _, losses, weights = self._losses(ends, float(s[-1].imag))
        peak = float((s[0].real * losses).max())
        found, rows = np.empty_like(s), max(1, _BLOCK // len(losses))
        if peak < 50:  # more digits, where losses are small
            for at in range(0, len(s), rows):
                found[at : at + rows] = np.log1p(np.expm1(s[at : at + rows, None] * losses) @ weights - left_out)
            return found
        for at in range(0, len(s), rows):
            found[at : at + rows] = np.log(np.exp(s[at : at + rows, None] * losses - peak) @ weights) + peak
        return found


class _Integral:
    """delta(epsilon), from the integrand at its nodes."""

    def __init__(
        self, s: npt.NDArray[np.complex128], widths: Float64Array, exponents: npt.NDArray[np.complex128]
    ) -> None:
        self._s, self._widths, self._exponents = s, widths, exponents

    def __call__(self, epsilon: float) -> float:
        return float(self._terms(epsilon).real @ self._widths) / math.pi

    def terms(self, epsilon: float) -> float:
        """Return how large the terms are that make up delta."""
        return float(np.abs(self._terms(epsilon)) @ np.abs(self._widths)) / math.pi

    def _terms(self, epsilon: float) -> npt.NDArray[np.complex128]:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(np.exp(self._exponents - self._s * epsilon) / (self._s * (self._s + 1)))


def one_event_delta(epsilon: float, sigma: float, rate: float, direction: str) -> float:
    """Return delta(epsilon) of one event in 60 digits, from normal distribution functions; epsilon may be negative."""
    import mpmath

    with mpmath.workdps(60):
        return float(_one_event_delta(mpmath.mpf(epsilon), 1 / mpmath.mpf(sigma), mpmath.mpf(rate), direction))


def two_event_delta(epsilon: float, sigma: float, rate: float, direction: str) -> float:
    """Return delta(epsilon) of two events: that of one at epsilon less the other's loss, averaged over its output."""
    import mpmath

    with mpmath.workdps(40):
        m, q, step = 1 / mpmath.mpf(sigma), mpmath.mpf(rate), mpmath.mpf(1) / 32
        found = mpmath.mpf(0)
        for index in range(math.ceil(32 * (26 + 1 / sigma))):
            y = -13 + index * step
            upper, lower = (
                1 - q + q * mpmath.exp(mean * y - mean**2 / 2) if direction != own else mpmath.mpf(1)
                for mean, own in ((m, "add"), (-m, "remove"))
            )
            density = upper * mpmath.exp(-y * y / 2) / mpmath.sqrt(2 * mpmath.pi)
            found += step * density * _one_event_delta(epsilon - mpmath.log(upper / lower), m, q, direction)
        return float(found)


def five_event_delta(epsilon: float, sigma: float, rate: float) -> float:
    """Return delta(epsilon) of five events, "remove", to 1e-4 of it: that of one, averaged over two pairs of others' outputs.

    For rare events with an epsilon next to nothing, where the integral would take hours.
    """
    from scipy.special import ndtr

    m, step = 1 / sigma, 0.125
    y = np.arange(-7, 7 + m, step)
    excess = rate * np.expm1(m * y - m * m / 2)
    losses, weights = np.log1p(excess), np.exp(-y * y / 2) * (1 + excess) * step / math.sqrt(2 * math.pi)
    first, second = np.triu_indices(len(y))
    pair_losses = losses[first] + losses[second]
    pair_weights = weights[first] * weights[second] * np.where(first == second, 1, 2)
    found = 0.0
    for loss, weight in zip(pair_losses, pair_weights, strict=True):
        growth = np.expm1(epsilon - loss - pair_losses)  # of what the fifth has to exceed
        with np.errstate(invalid="ignore", divide="ignore"):
            start = np.log1p(growth / rate) / m + m / 2
        missing = ndtr(-start)
        delta = np.where(growth > -rate, rate * (ndtr(m - start) - missing) - growth * missing, -growth)
        found += float(weight * (pair_weights @ delta))
    return found


def _one_event_delta(epsilon: Any, m: Any, q: Any, direction: str) -> Any:
    import mpmath

    factor = mpmath.exp(epsilon)

    def tail(start: Any, mean: Any) -> Any:
        return mpmath.erfc((start - mean) / mpmath.sqrt(2)) / 2

    # P exceeds e^epsilon · Q from `start` on.
    if direction == "remove":
        if factor <= 1 - q:
            return 1 - factor
        start = mpmath.log((factor - 1 + q) / q) / m + m / 2
        return (1 - q) * tail(start, 0) + q * tail(start, m) - factor * tail(start, 0)
    if direction == "add":
        if 1 / factor <= 1 - q:
            return mpmath.mpf(0)
        start = -(mpmath.log((1 / factor - 1 + q) / q) / m + m / 2)
        return tail(start, 0) - factor * ((1 - q) * tail(start, 0) + q * tail(start, -m))
    c, b = q * mpmath.exp(-m * m / 2), (1 - q) * (1 - factor)
    start = mpmath.log((-b + mpmath.sqrt(b * b + 4 * c * c * factor)) / (2 * c)) / m
    return (1 - q) * (1 - factor) * tail(start, 0) + q * (tail(start, m) - factor * tail(start, -m))
