"""Computes, before an attack is played, the smallest leak that it will catch with probability 0.99.

A leak is a factor above the claim: a leak of 2 means noise of half the claimed standard deviation, or twice the rate. Where
the claim is 0 (no correlation, no distance), it is the value itself. Each function mirrors one attack: its own statistic,
threshold and numbers; tests play each attack 500 times at the stated leak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from fedray.audit.bounds import (
    ALPHA,
    Counts,
    binomial_lower,
    correlation_limit,
    distance_limit,
    game_bound,
)

POWER = 0.99
_LARGEST_LEAK = 100.0
_CERTAINLY_EQUAL = 0.999  # rounding keeps equal noises from correlating much more


def game_leak(claim: float, runs: int, false_runs: int, effect: float = 1.0, alpha: float = ALPHA) -> float | None:
    """Return the smallest leak that T5 catches, threshold halfway between the two worlds.

    Args:
        claim: mu.
        runs: How many runs have the canary.
        false_runs: How many have not.
        effect: How far the canary really moves the sum, over what the claim allows (a short gradient moves it less).
        alpha: Of the bound.
    """
    miss = (1 - POWER) / 2

    def caught(leak: float) -> bool:
        rate = float(stats.norm.cdf(leak * effect * claim / 2))
        counts = Counts(
            hits=int(stats.binom.ppf(miss, runs, rate)),
            with_canary=runs,
            false_alarms=int(stats.binom.isf(miss, false_runs, 1 - rate)),
            without_canary=false_runs,
        )
        return game_bound(counts, alpha) > claim

    return _smallest(caught)


def gaussian_leak(
    claim: float, canaries: int, free: int, gap: float = 1.0, effect: float = 1.0, alpha: float = ALPHA
) -> float | None:
    """Return the smallest leak that T7 catches.

    Args:
        claim: mu = gap · (canary's norm over the noise's standard deviation).
        canaries: K scores.
        free: n scores.
        gap: Distance of the two worlds over the canary's norm.
        effect: Honest mean of the canaries' scores.
        alpha: Of the bound.
    """
    wide = math.sqrt(float(stats.chi2.isf((1 - POWER) / 2, free)) / float(stats.chi2.ppf(alpha / 2, free)))
    low = float(stats.norm.isf((1 - POWER) / 2)) / math.sqrt(canaries)
    margin = float(stats.norm.isf(alpha / 2)) / math.sqrt(canaries)

    def caught(leak: float) -> bool:
        return gap * ((leak * effect * claim / gap - low) / wide - margin) > claim

    return _smallest(caught)


def noise_leak(values: int, alpha: float = ALPHA) -> float | None:
    """Return the smallest leak that T1 catches in so many values of noise: chi²_n at 0.99 over chi²_n at alpha, its root."""
    leak = math.sqrt(float(stats.chi2.ppf(POWER, values)) / float(stats.chi2.ppf(alpha, values)))
    return leak if leak <= _LARGEST_LEAK else None


def shape_leak(values: int, alpha: float = ALPHA) -> float | None:
    """Return the smallest distance from the normal distribution that T1 catches in so many values."""
    distance = distance_limit(values, alpha) + distance_limit(values, 2 * (1 - POWER))
    return distance if distance < 0.5 else None  # one symmetric distribution is at most half from another


def correlation_leak(tests: Sequence[Sequence[tuple[int, float]]]) -> float | None:
    """Return the smallest correlation that T2 catches, whichever coordinate of a key it comes from.

    Args:
        tests: For each coordinate, the tests that see noise which correlates throughout it: (values, alpha).
    """
    found = [_smallest_correlation(options) for options in tests]
    caught = [leak for leak in found if leak is not None]
    return max(caught) if caught and len(caught) == len(found) else None


def _smallest_correlation(options: Sequence[tuple[int, float]]) -> float | None:
    """Return what one of the tests catches: the limit, farther by Fisher's (1921) atanh(r) ≈ N(atanh(rho), 1/(n − 2))."""
    leaks = []
    for size, alpha in options:
        limit = correlation_limit(size, alpha)
        if size > 3 and limit < _CERTAINLY_EQUAL:
            leaks.append(math.tanh(math.atanh(limit) + float(stats.norm.isf(1 - POWER)) / math.sqrt(size - 3)))
    return min(leaks, default=None)


def rate_leak(rate: float, trials: int, alpha: float = ALPHA) -> float | None:
    """Return the smallest factor above the claimed rate that T3 catches in so many coins."""

    def caught(leak: float) -> bool:
        successes = int(stats.binom.ppf(1 - POWER, trials, min(1.0, leak * rate)))
        return binomial_lower(successes, trials, alpha / 2) > rate

    return _smallest(caught, 1 / rate)


def dependence_leak(rate: float, trials: Sequence[int], alpha: float = ALPHA) -> float | None:
    """Return by which factor neighbouring draws must share more than independent ones for T3 to see it.

    Args:
        rate: q; two draws that are the same share 1/q times more than independent ones.
        trials: For each coordinate (step, round, …), how many coins its pairs hold.
        alpha: Of the attack.
    """
    if not trials or rate >= 1.0:
        return None

    def caught(leak: float) -> bool:
        successes = int(stats.binom.ppf(1 - POWER, min(trials), min(1.0, leak * rate**2)))
        return binomial_lower(successes, min(trials), alpha / 3 / len(trials)) > rate**2

    return _smallest(caught, 1 / rate)


def share_leak(draws: int, alpha: float = ALPHA) -> float | None:
    """Return how far from one half the share of sizes in the middle must be, as a factor, for T3 to see it."""

    def caught(leak: float) -> bool:
        inside = int(stats.binom.ppf(1 - POWER, draws, min(1.0, leak / 2)))
        return binomial_lower(inside, draws, alpha / 2) > 0.5

    return _smallest(caught, 2.0)


def right_guesses(leak: float, sigma: float, rate: float, steps: int, share: float) -> float:
    """Return the chance of T6's guesses to be right, when the noise is `leak` times too small.

    The score of a canary is N(0, steps·(sigma/leak)²), and Binomial(steps, rate) more when it is in. Guessed are the share
    with the highest scores (in) and as many with the lowest (out).

    Args:
        leak: Factor.
        sigma: Claimed noise multiplier.
        rate: q.
        steps: Local steps.
        share: Of the canaries that are guessed each way, at most 1/2.
    """
    drawn = np.arange(int(stats.binom.isf(1e-12, steps, rate)) + 1)
    weights = stats.binom.pmf(drawn, steps, rate)
    scale = sigma / leak * math.sqrt(steps)

    def above(score: float) -> tuple[float, float]:
        return float(weights @ stats.norm.sf((score - drawn) / scale)), float(stats.norm.sf(score / scale))

    def quantile(level: float) -> float:
        low, high = -40.0 * scale, 40.0 * scale + steps
        while high - low > 1e-9 * scale:
            middle = (low + high) / 2
            low, high = (middle, high) if sum(above(middle)) / 2 > level else (low, middle)
        return high

    top_in, top_out = above(quantile(share))
    rest_in, rest_out = above(quantile(1 - share))
    return (top_in / (top_in + top_out) + (1 - rest_out) / (2 - rest_in - rest_out)) / 2


def one_run_leak(sigma: float, rate: float, steps: int, canaries: int, each: int, limit: int) -> float | None:
    """Return the smallest leak that T6 catches.

    Args:
        sigma: Claimed noise multiplier.
        rate: q.
        steps: Local steps.
        canaries: m.
        each: Guesses each way.
        limit: Right guesses that the claim allows.
    """

    def caught(leak: float) -> bool:
        chance = right_guesses(leak, sigma, rate, steps, each / canaries)
        return int(stats.binom.ppf(1 - POWER, 2 * each, chance)) > limit

    return _smallest(caught)


def _smallest(caught: Callable[[float], bool], largest: float = _LARGEST_LEAK) -> float | None:
    if not caught(largest):
        return None
    low, high = 1.0, largest
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if caught(middle) else (middle, high)
    return high
