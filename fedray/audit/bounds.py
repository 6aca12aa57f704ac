"""From what an attack saw to a lower bound of what the mechanism leaks. Pure statistics; knows no mechanism.

Every bound here exceeds the truth with probability at most `alpha` when its assumptions hold, so a bound above the claim
refutes the claim. The suite and the audit use alpha = 1e-6 an attack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

ALPHA = 1e-6
LARGEST_MU = 1e6  # stands for "no noise at all": JSON has no infinity
Float64Array = npt.NDArray[np.float64]


def binomial_lower(successes: int, trials: int, alpha: float) -> float:
    """Return the one-sided lower confidence bound of a probability (Clopper and Pearson 1934)."""
    return float(stats.beta.ppf(alpha, successes, trials - successes + 1)) if successes > 0 else 0.0


def binomial_upper(successes: int, trials: int, alpha: float) -> float:
    """Return the one-sided upper confidence bound of a probability (Clopper and Pearson 1934)."""
    return float(stats.beta.isf(alpha, successes + 1, trials - successes)) if successes < trials else 1.0


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How a distinguishing game ended.

    Args:
        hits: Runs of the world with the canary that the attacker called so.
        with_canary: Runs of that world.
        false_alarms: Runs of the other world that the attacker called so.
        without_canary: Runs of the other world.
    """

    hits: int
    with_canary: int
    false_alarms: int
    without_canary: int


def count(with_canary: Float64Array, without_canary: Float64Array, threshold: float) -> Counts:
    """Count the runs of both worlds whose score lies above a threshold that was fixed before they were played."""
    return Counts(
        hits=int((with_canary > threshold).sum()),
        with_canary=len(with_canary),
        false_alarms=int((without_canary > threshold).sum()),
        without_canary=len(without_canary),
    )


def game_bound(counts: Counts, alpha: float = ALPHA) -> float:
    """Return a lower bound of mu from a distinguishing game (T5; Dong et al. 2019: mu-GDP bounds every test).

    mu_lb = Phi^-1(TPR_lo) − Phi^-1(FPR_hi), each rate by Clopper–Pearson at alpha/2.

    Guarantee:
        Exceeds the mechanism's mu with probability at most alpha, whatever the scores' distribution: the attacker's
        threshold was fixed beforehand and the runs are independent.
    """
    hit_rate = binomial_lower(counts.hits, counts.with_canary, alpha / 2)
    alarm_rate = binomial_upper(counts.false_alarms, counts.without_canary, alpha / 2)
    return max(0.0, float(stats.norm.ppf(hit_rate) - stats.norm.ppf(alarm_rate)))


@dataclass
class Scores:
    """Scores along canary and canary-free directions, in units of the canary's norm (honest mean 1), summed up as they come."""

    canaries: int = 0
    total: float = 0.0
    free: int = 0
    free_squares: float = 0.0

    def add(self, canaries: Float64Array, free: Float64Array) -> None:
        """Count a release's scores."""
        self.canaries += canaries.size
        self.total += float(canaries.sum())
        self.free += free.size
        self.free_squares += float((free * free).sum())


def gaussian_bound(scores: Scores, alpha: float = ALPHA, gap: float = 1.0) -> float:
    """Return a lower bound of mu from scores along canary and canary-free directions (T7).

    s_hi = sqrt(sum(free²)/chi²_{alpha/2, n}); mu_lb = gap·(mean(canaries) − z_{1−alpha/2}·s_hi/sqrt(K))/s_hi.

    Args:
        scores: K along canaries and n along directions without one; these give the scale. Nothing is divided by a claimed
            sigma.
        alpha: Chance to exceed the truth.
        gap: Distance of the two worlds over the canary's norm (2 when +C is told from −C).

    Guarantee:
        Exceeds the mechanism's mu with probability at most alpha when its noise is normal and equal in all directions.

    Edge cases:
        0 without scores. Without any noise: 1e6, since JSON has no infinity.
    """
    if scores.canaries == 0 or scores.free == 0 or scores.total <= 0:
        return 0.0
    scale = math.sqrt(scores.free_squares / float(stats.chi2.ppf(alpha / 2, scores.free)))
    margin = float(stats.norm.isf(alpha / 2)) / math.sqrt(scores.canaries)
    mean = scores.total / scores.canaries
    return min(LARGEST_MU, max(0.0, gap * (mean / scale - margin))) if scale > 0 else LARGEST_MU


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the p-value of "(epsilon, delta)-DP" after one run (Steinke, Nasr and Jagielski 2023, Theorem 5.2).

    q = 1/(1+e^-eps); beta = P[Bin(r,q) ≥ v]; a = max over 1≤i≤v of (P[Bin(r,q) ≥ v−i] − beta)/i;
    p = min(1, beta + 2·m·delta·a).

    Args:
        canaries: m, each included with probability 1/2.
        guesses: r, how many the attacker guessed (the number was fixed beforehand).
        right: v, how many guesses were right.
        epsilon: Of the claim.
        delta: Of the claim.
    """
    rate = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, rate))
    if right == 0:
        return 1.0
    tails = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, rate))  # P[v−i ≤ Bin < v], i = 1 … v
    slope = float((tails / np.arange(1, right + 1)).max())
    return min(1.0, beta + 2 * canaries * delta * slope)


def one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, alpha: float = ALPHA) -> float:
    """Return eps_lb = sup{eps: p ≤ alpha}, the largest epsilon that one run refutes (T6; Steinke et al. 2023).

    Guarantee:
        Exceeds an epsilon for which the mechanism is (epsilon, delta)-DP with probability at most alpha.

    Edge cases:
        0 when nothing is refuted; always so when 2·m·delta exceeds alpha by much: delta must be ≤ 1e-12 for alpha = 1e-6.
    """
    if one_run_p_value(canaries, guesses, right, 0.0, delta) > alpha:
        return 0.0
    low, high = 0.0, 1.0
    while one_run_p_value(canaries, guesses, right, high, delta) <= alpha:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        refuted = one_run_p_value(canaries, guesses, right, middle, delta) <= alpha
        low, high = (middle, high) if refuted else (low, middle)
    return low


def canary_gateways_mu(cosines: Float64Array, num_params: int) -> tuple[float, float, float]:
    """Return (mu_hat, low, high) of T8 (Andrew et al. 2023): sqrt(d)·mean(cosine) and its 95 % interval.

    Args:
        cosines: `[K]` of each canary gateway's direction with the released update.
        num_params: d. A direction that was not used has a cosine of about N(0, 1/d).

    Guarantee:
        None: an estimate for a report, no bound.
    """
    estimate = math.sqrt(num_params) * float(cosines.mean())
    half = 1.96 / math.sqrt(len(cosines))
    return estimate, estimate - half, estimate + half


def area_under_curve(outliers: Float64Array, others: Float64Array) -> float:
    """Return the chance that an outlier scores above another, ties counted half (Mann and Whitney 1947)."""
    above = (outliers[:, None] > others[None, :]).mean()
    equal = (outliers[:, None] == others[None, :]).mean()
    return float(above + equal / 2)
