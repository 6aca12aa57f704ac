"""The privacy loss of one Poisson-subsampled Gaussian, in one direction: exact, or rounded to a grid.

With m = 1 / noise multiplier, q the rate and outputs in units of the noise's standard deviation, both worlds are mixtures of
normals, and the loss L(y) = log P(y)/Q(y) grows with the output y (for "add" y is mirrored):

- remove: P = (1 − q) N(0, 1) + q N(m, 1) against Q = N(0, 1)
- add: P = N(0, 1) against Q = (1 − q) N(0, 1) + q N(−m, 1)
- replace: P = (1 − q) N(0, 1) + q N(m, 1) against Q = (1 − q) N(0, 1) + q N(−m, 1)

Everything is summed over nodes of a quadrature whose terms are all positive: differences of distribution functions lose every
digit where a loss is 1e-10, as at a noise multiplier of 1000 and a rate of 1e-7.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Direction = Literal["remove", "add", "replace"]

OUTSIDE = 11.5  # standard deviations; P puts less than 1e-30 beyond
MASS_OUTSIDE = 1e-30
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)
_PANEL = 0.1  # standard deviations: four nodes have a relative error below 1e-9 on it, out to OUTSIDE
_COARSE_PANEL = 0.25
_BLOCK = 2**15  # panels at a time: what keeps memory in bounds
_SLACK = 1e-9  # relative; above the error of the quadrature and of the arithmetic


class PrivacyLoss:
    """One event's privacy loss in one direction.

    Args:
        noise_multiplier: Positive.
        rate: In (0, 1].
        direction: Which of the two worlds holds the record (or gateway), or that both hold one.

    Attributes:
        weights: [n] probabilities under P of the nodes of a quadrature, in ascending order.
        losses: [n] losses there; with the weights they give moments.
        ends: [p + 1] losses at the ends of the quadrature's panels.
        below: [p + 1] the probability under P of less than each end's loss.
        above: [p + 1] the probability under P of more than each end's loss.
    """

    def __init__(self, noise_multiplier: float, rate: float, direction: Direction) -> None:
        self._shift = 1 / noise_multiplier
        self._rate = rate
        self._direction = direction
        highest = OUTSIDE + (0.0 if direction == "add" else self._shift)
        self._edges = np.linspace(-OUTSIDE, highest, math.ceil((highest + OUTSIDE) / _COARSE_PANEL) + 1)
        y, widths = _quadrature(self._edges)
        self.weights = self._density(y) * widths
        self.losses = self.at(y)
        self.ends = self.at(self._edges)
        masses = self.weights.reshape(-1, len(_NODES)).sum(1) * (1 + _SLACK)
        self.below = MASS_OUTSIDE + np.append(0.0, np.cumsum(masses))
        self.above = MASS_OUTSIDE + np.append(np.cumsum(masses[::-1])[::-1], 0.0)

    def at(self, y: Float64Array) -> Float64Array:
        """Return the loss at outputs."""
        up, down = self._shift * y - self._shift**2 / 2, -self._shift * y - self._shift**2 / 2
        if self._direction == "remove":
            return self._log_mixture(up)
        if self._direction == "add":
            return -self._log_mixture(down)
        return self._log_mixture(up) - self._log_mixture(down)

    def divergence(self, epsilon: float) -> float:
        """Return delta(epsilon) of one event, the hockey-stick divergence, at most 1e-9 (relative) above the truth."""
        start, highest = float(self._outputs(np.array([epsilon]))[0]), float(self._edges[-1])
        if start >= highest:
            return MASS_OUTSIDE
        edges = np.linspace(start, highest, max(2, math.ceil((highest - start) / _PANEL) + 1))
        y, widths = _quadrature(edges)
        excess = np.maximum(-np.expm1(epsilon - self.at(y)), 0.0)
        return float((self._density(y) * widths) @ excess) * (1 + _SLACK) + MASS_OUTSIDE

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon ≥ 0 of one event at delta: exact but for a relative 1e-8, and never below the truth."""
        if self.divergence(0.0) <= delta:
            return 0.0
        low, high = 0.0, float(self.losses[-1])
        while self.divergence(high) > delta:
            low, high = high, 2 * high
        while low < high / 2 and high > 1e-300:  # the scale first: losses may be 1e-10
            low, high = (low, high / 2) if self.divergence(high / 2) <= delta else (high / 2, high)
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.divergence(middle) > delta else (low, middle)
        return high

    def on_grid(self, interval: float, first_end: int, last_end: int) -> tuple[int, Float64Array]:
        """Return the loss rounded to multiples of `interval`, pessimistically: the lowest multiple, and all probabilities.

        The mass between two multiples goes to both, so that its probability under Q, the mean of e^(−loss), stays ("connect
        the dots", Doroshenko et al. 2022). The divergence is convex in e^(−loss) and can only grow, composed or not.

        Args:
            interval: Positive.
            first_end: Index in `ends` below which everything counts with the lowest multiple.
            last_end: Index in `ends` above which nothing is returned: `above` there counts with an infinite loss.
        """
        lowest, highest = float(self._edges[first_end]), float(self._edges[last_end])
        first, last = math.floor(self.ends[first_end] / interval), math.ceil(self.ends[last_end] / interval)
        probabilities = np.zeros(last - first + 2)
        for start in range(first, last + 1, _BLOCK):
            multiples = np.arange(start, min(start + _BLOCK, last + 1) + 1)
            y = np.clip(self._outputs(multiples * interval), lowest, highest)
            pieces = np.maximum(np.ceil(np.diff(y) / _PANEL), 1).astype(int)
            cell = np.repeat(np.arange(len(pieces)), pieces)
            within = np.arange(len(cell)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            width = np.diff(y)[cell] / pieces[cell]
            left = y[:-1][cell] + within * width
            nodes = left[:, None] + width[:, None] * (_NODES + 1) / 2
            masses = self._density(nodes) * (width[:, None] * (_WEIGHTS / 2))
            above = np.clip(self.at(nodes) - (multiples[:-1] * interval)[cell][:, None], 0.0, interval)
            upper = (masses * np.expm1(-above)).sum(1) / math.expm1(-interval)
            whole = masses.sum(1)
            at = start - first
            probabilities[at : at + len(pieces)] += np.bincount(cell, whole - upper, len(pieces))
            probabilities[at + 1 : at + 1 + len(pieces)] += np.bincount(cell, upper, len(pieces))
        probabilities[0] += self.below[first_end]
        return first, np.maximum(probabilities, 0.0)

    def _density(self, y: Float64Array) -> Float64Array:
        """Return P's density."""
        away = np.exp(-y * y / 2) / math.sqrt(2 * math.pi)
        if self._direction == "add":
            return away
        return (1 - self._rate) * away + self._rate * np.exp(-((y - self._shift) ** 2) / 2) / math.sqrt(2 * math.pi)

    def _log_mixture(self, exponent: Float64Array) -> Float64Array:
        """Return log(1 − q + q e^exponent), to full relative precision also where it is tiny."""
        rate = self._rate
        found = np.log1p(rate * np.expm1(np.clip(exponent, -50.0, 30.0)))
        large = exponent > 30
        found[large] = exponent[large] + np.log(rate + (1 - rate) * np.exp(-exponent[large]))
        if rate > 0.5:  # 1 + q·expm1 would cancel
            small = exponent < -1
            log_kept = math.log1p(-rate) if rate < 1 else -math.inf
            found[small] = np.logaddexp(log_kept, math.log(rate) + exponent[small])
        return found

    def _outputs(self, losses: Float64Array) -> Float64Array:
        """Return the outputs with these losses, the inverse of `at`; infinite where no output has one."""
        if self._direction == "remove":
            return self._exponents(losses) / self._shift + self._shift / 2
        if self._direction == "add":
            return -(self._exponents(-losses) / self._shift + self._shift / 2)
        # e^(m y) solves c x² + (1 − q)(1 − e^L) x = c e^L with c = q e^(−m²/2), so m y = L/2 + asinh((1 − q) sinh(L/2) / c).
        half = np.abs(losses) / 2
        if self._rate >= 1:
            return losses / (2 * self._shift)
        with np.errstate(divide="ignore"):
            log_sinh = np.where(half > 30, half - math.log(2), np.log(np.sinh(np.minimum(half, 30.0))))
        log_ratio = log_sinh + math.log1p(-self._rate) - math.log(self._rate) + self._shift**2 / 2
        arc = np.where(log_ratio > 30, log_ratio + math.log(2), np.arcsinh(np.exp(np.minimum(log_ratio, 30.0))))
        return np.sign(losses) * (half + arc) / self._shift

    def _exponents(self, log_mixtures: Float64Array) -> Float64Array:
        """Return the inverse of `_log_mixture`; −inf below its lower end."""
        rate = self._rate
        with np.errstate(divide="ignore", invalid="ignore"):
            small = np.minimum(log_mixtures, 30.0)
            found = np.log1p(np.maximum(np.expm1(small) / rate, -1.0))
            if rate > 0.5:
                found = np.where(small < -1, np.log(np.maximum(np.exp(small) - (1 - rate), 0.0) / rate), found)
        large = log_mixtures > 30
        found[large] = log_mixtures[large] + np.log1p(-(1 - rate) * np.exp(-log_mixtures[large])) - math.log(rate)
        return found


def _quadrature(edges: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return nodes and weights of a Gauss–Legendre quadrature over panels."""
    width = np.diff(edges)[:, None]
    return (edges[:-1, None] + width * (_NODES + 1) / 2).ravel(), (width * (_WEIGHTS / 2)).ravel()
