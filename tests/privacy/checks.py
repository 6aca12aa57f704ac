"""Statistical and numerical checks: plain functions that raise AssertionError, for honest and for mutated mechanisms.

Each statistic is tested at its own level `alpha`, two-sided; the default 1e-6 is that of the suite. benchmarks/proofs.py
counts how often honest noise is rejected at .05 (`also_at`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import stats

ALPHA = 1e-6
ROUNDING = 1e-5  # what float32 may add to a sensitivity, relative

Vector = npt.NDArray[np.float32] | npt.NDArray[np.float64]


_watched: list[tuple[float, list[tuple[str, bool]]]] = []


@contextmanager
def also_at(alpha: float) -> Iterator[list[tuple[str, bool]]]:
    """Judge each statistic at another level as well; yield a list that gets (statistic, whether it was rejected)."""
    found: list[tuple[str, bool]] = []
    _watched.append((alpha, found))
    try:
        yield found
    finally:
        _watched.pop()


def _judge(name: str, holds: Callable[[float], bool], alpha: float, message: str) -> None:
    for level, found in _watched:
        found.append((name, not holds(level)))
    assert holds(alpha), message


@lru_cache(maxsize=64)
def _chi_square_interval(freedom: int, alpha: float) -> tuple[float, float]:
    low, high = stats.chi2.ppf(alpha / 2, freedom), stats.chi2.isf(alpha / 2, freedom)
    return float(low), float(high)


def check_noise_variance(noise: Vector, std: float, alpha: float = ALPHA) -> None:
    """Reject unless sum(x²)/std² lies within the chi-square quantiles of n degrees of freedom."""
    noise = noise.astype(np.float64).ravel()
    statistic = float(np.square(noise).sum()) / std**2  # a dot product would start BLAS threads

    def holds(alpha: float) -> bool:
        low, high = _chi_square_interval(noise.size, alpha)
        return low <= statistic <= high

    _judge("variance", holds, alpha, f"noise is {np.sqrt(statistic / noise.size):.4f} times as large as claimed")


def check_noise_shape(noise: Vector, std: float, alpha: float = ALPHA) -> None:
    """Reject unless the Kolmogorov–Smirnov distance to N(0, std) is small (0.00777 at 120 000 values and 1e-6)."""
    ordered = np.sort(noise.astype(np.float64).ravel())
    expected = stats.norm.cdf(ordered, scale=std)
    n = ordered.size
    distance = max(float((np.arange(1, n + 1) / n - expected).max()), float((expected - np.arange(n) / n).max()))

    def limit(alpha: float) -> float:
        return float(np.sqrt(-np.log(alpha / 2) / (2 * n)))

    message = f"noise is not normal: distance {distance:.5f} > {limit(alpha):.5f}"
    _judge("shape", lambda alpha: distance <= limit(alpha), alpha, message)


def check_noise_law(noise: Vector, std: float, alpha: float = ALPHA) -> None:
    """Reject unless the values look like independent draws of N(0, std²): variance, then shape."""
    check_noise_variance(noise, std, alpha)
    check_noise_shape(noise, std, alpha)


def check_independence(vectors: Vector, alpha: float = ALPHA) -> None:
    """Reject when two of the G vectors `[G, d]` are correlated: only this finds noise that was used twice."""
    matrix = vectors.astype(np.float64)
    count, length = matrix.shape
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    assert (norms > 0).all(), "a vector is zero"
    correlation = (matrix / norms) @ (matrix / norms).T
    np.fill_diagonal(correlation, 0.0)
    worst = np.unravel_index(np.abs(correlation).argmax(), correlation.shape)
    largest = abs(float(correlation[worst]))

    def limit(alpha: float) -> float:
        return float(stats.norm.isf(alpha / (count * (count - 1))) / np.sqrt(length))

    message = f"vectors {worst} correlate by {correlation[worst]:.4f} (limit {limit(alpha):.4f})"
    _judge("independence", lambda alpha: largest < limit(alpha), alpha, message)


def check_record_counts(drawn: npt.NDArray[np.bool_], rate: float, alpha: float = ALPHA) -> None:
    """Reject unless every record of `[T, N]` was drawn about T·q times."""
    draws, records = drawn.shape
    excess = np.abs(drawn.sum(axis=0) - draws * rate)

    def limit(alpha: float) -> float:
        return float(stats.norm.isf(alpha / (2 * records)) * np.sqrt(draws * rate * (1 - rate)))

    message = f"record {int(excess.argmax())} is off by {excess.max():.0f} draws (limit {limit(alpha):.0f})"
    _judge("record counts", lambda alpha: bool((excess <= limit(alpha)).all()), alpha, message)


def check_batch_sizes(drawn: npt.NDArray[np.bool_], rate: float, alpha: float = ALPHA) -> None:
    """Reject unless the variance of the batch sizes is N·q·(1 − q): Poisson sampling, not fixed or shuffled batches."""
    draws, records = drawn.shape
    variance = records * rate * (1 - rate)
    ratio = float(((drawn.sum(axis=1) - records * rate) ** 2).mean()) / variance
    kurtosis = (1 - 6 * rate * (1 - rate)) / variance  # of the binomial, above the normal's

    def holds(alpha: float) -> bool:
        return abs(ratio - 1) <= float(stats.norm.isf(alpha / 2) * np.sqrt((2 + kurtosis) / draws))

    _judge("batch sizes", holds, alpha, f"batch sizes vary {ratio:.3f} times as much as Poisson batches")


def check_distance(first: Vector, second: Vector, bound: float) -> None:
    """Reject unless both are finite and at most `bound`·(1 + 1e-5) apart (L2)."""
    assert np.isfinite(first).all(), "the release of D is not finite"
    assert np.isfinite(second).all(), "the release of D' is not finite"
    distance = float(np.linalg.norm(first.astype(np.float64) - second.astype(np.float64)))
    assert distance <= bound * (1 + ROUNDING), f"neighbours differ by {distance:.6g}, declared is {bound:g}"


def check_false_alarms(alarms: int, trials: int, alpha: float) -> None:
    """Reject when more alarms were seen than alpha explains (one-sided binomial bound of 99.9 %)."""
    limit = int(stats.binom.ppf(0.999, trials, alpha))
    assert alarms <= limit, f"{alarms} of {trials} honest trials were rejected at alpha = {alpha} (limit {limit})"
