"""An accountant of another kind, to hold fedray's against: no grid and no Fourier transform of a distribution.

delta(epsilon) = (1/pi) · integral over t ≥ 0 of Re[e^(n K(s) − s epsilon) / (s (s + 1))], s = c + it, for any c > 0, where K is
the cumulant function of one event's loss (Zhu et al. 2022; Alghamdi et al. 2023). K is summed by the trapezoidal rule, which
converges exponentially on normal densities. What is left out are digits: results are good to about 1e-4, in either direction.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_WINDOW = 40.0  # delta is smoothed over a fortieth of the scale on which it falls
_BLOCK = 2**19
_MOST_WORK = 1e8  # nodes: some ten seconds


class Contour:
    """One event's loss in one direction, "remove", "add" or "replace"."""

    def __init__(self, sigma: float, rate: float, direction: str) -> None:
        self._sigma, self._rate, self._direction = sigma, rate, direction
        self._work = 0
        self._ends = (-13.0, 13.0) if direction == "add" else (-13.0, 13.0 + 1 / sigma)

    def losses(self, points: int, ends: tuple[float, float]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return losses at equally spaced outputs and their probabilities, in the worlds as they are usually written."""
        y, step = np.linspace(*ends, points, retstep=True)
        m, rate = 1 / self._sigma, self._rate

        def log_mixture(mean: float) -> npt.NDArray[np.float64]:
            exponent = y * mean - mean**2 / 2
            small = np.log1p(rate * np.expm1(np.minimum(exponent, 1.0)))
            return np.where(exponent < 1, small, np.logaddexp(math.log1p(-rate), math.log(rate) + exponent))

        upper = np.zeros_like(y) if self._direction == "add" else log_mixture(m)
        lower = np.zeros_like(y) if self._direction == "remove" else log_mixture(-m)
        weights = np.exp(upper - y * y / 2) * step / math.sqrt(2 * math.pi)
        return upper - lower, weights

    def epsilon(self, count: int, delta: float, near: float) -> float:
        """Return epsilon at delta, which must lie within half of `near`: that only says where to integrate."""
        losses, weights = self.losses(2000, self._ends)
        c = self._saddle(losses, weights, count, near)
        tilted = weights * np.exp(c * losses - (c * losses).max())
        tilted /= tilted.sum()
        deviation = math.sqrt(count * float(tilted @ (losses - tilted @ losses) ** 2))
        window = _WINDOW * max(c, 1 / near)
        most = 5 * window
        t, dt, values = [], [], []
        start = 0.0
        peak = None
        exponents = np.log(weights) + c * losses
        matters = np.flatnonzero(exponents > exponents.max() - 46)  # 1e-20 of it
        ends = tuple(np.linspace(*self._ends, 2000)[matters[[0, -1]]])
        span = float(np.ptp(losses[matters]))
        jumps = float(np.ptp(losses[exponents > exponents.max() - 30]))
        width = 3 / (deviation + near + jumps)  # of a panel, within which the integrand turns a few times at most
        while start < most:
            # The pole at 0 is c away: narrow panels at first.
            narrow = max(c, start) / 2
            edges = start + (np.array([0.0, narrow]) if narrow < width else width * np.arange(33))
            nodes = (edges[:-1, None] + np.diff(edges)[:, None] * (_NODES + 1) / 2).ravel()
            self._work += len(nodes) * self._points(nodes, span)
            if self._work > _MOST_WORK:
                raise OverflowError("too many nodes")
            cumulants = count * self._cumulant(c + 1j * nodes, ends, span)
            t.append(nodes)
            dt.append(np.outer(np.diff(edges), _WEIGHTS / 2).ravel())
            values.append(cumulants - (nodes / window) ** 2 / 2)
            peak = float(cumulants[0].real) if peak is None else peak
            if (values[-1].real - peak).max() < -35:
                break
            start = float(edges[-1])
            width *= 1.0
        s = c + 1j * np.concatenate(t)
        exponents, widths = np.concatenate(values), np.concatenate(dt)

        if float(np.abs(np.exp(exponents - s * near) / (s * (s + 1))) @ widths) > 1e8 * delta:
            raise ArithmeticError("too few digits are left")

        def found(epsilon: float) -> float:
            return float((np.exp(exponents - s * epsilon) / (s * (s + 1))).real @ widths) / math.pi

        step = min(0.02 * near, deviation)
        while not found(near - step) > delta >= found(near + step):  # far from `near`, rounding would be larger than delta
            if (step := 2 * step) > near / 2:
                raise ArithmeticError(f"epsilon does not lie within half of {near}")
        low, high = near - step, near + step
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if found(middle) > delta else (low, middle)
        return high

    @staticmethod
    def _saddle(losses: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], count: int, near: float) -> float:
        """Return the c > 0 at which n K(c) − c epsilon is smallest."""
        low, high = 1e-12, 1e16
        for _ in range(100):
            middle = math.sqrt(low * high)
            tilted = weights * np.exp(middle * losses - (middle * losses).max())
            low, high = (middle, high) if count * float(tilted @ losses) < near * float(tilted.sum()) else (low, middle)
        return low

    @staticmethod
    def _points(t: npt.NDArray[np.float64], span: float) -> int:
        return max(600, math.ceil(2 * float(t.max()) * span))

    def _cumulant(self, s: npt.NDArray[np.complex128], ends: tuple[float, float], span: float) -> npt.NDArray[np.complex128]:
        points = self._points(s.imag, span)
        losses, weights = self.losses(points, ends)
        found = np.empty_like(s)
        peak = float((s[0].real * losses).max())
        rows = max(1, _BLOCK // points)
        for at in range(0, len(s), rows):
            found[at : at + rows] = np.log(np.exp(s[at : at + rows, None] * losses - peak) @ weights) + peak
        return found
