"""The smallest leak that an attack catches with probability 0.99, found before it is played.

A leak is a factor: a leak of 2 means noise of half the claimed standard deviation (an epsilon of twice the claim for T6).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import stats

from fedray.audit.bounds import ALPHA, Counts, game_bound, one_run_epsilon

POWER = 0.99
_LARGEST_LEAK = 100.0


def game_leak(claim: float, runs: int, false_runs: int, effect: float = 1.0, alpha: float = ALPHA) -> float | None:
    """Return the smallest leak that T5 catches, threshold halfway between the two worlds.

    Args:
        claim: mu.
        runs: With the canary.
        false_runs: Without it.
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


def one_run_leak(claim: float, canaries: int, guesses: int, delta: float, alpha: float = ALPHA) -> float | None:
    """Return the smallest leak that T6 catches: of a mechanism whose guesses are right as often as its epsilon allows."""

    def caught(leak: float) -> bool:
        rate = 1.0 / (1.0 + math.exp(-leak * claim))
        right = int(stats.binom.ppf(1 - POWER, guesses, rate))
        return one_run_epsilon(canaries, guesses, right, delta, alpha) > claim

    return _smallest(caught)


def _smallest(caught: Callable[[float], bool]) -> float | None:
    if not caught(_LARGEST_LEAK):
        return None
    low, high = 1.0, _LARGEST_LEAK
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if caught(middle) else (middle, high)
    return high
