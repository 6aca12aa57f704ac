"""Turns what an attack saw into a lower bound of what the mechanism leaks. Pure statistics; knows no mechanism.

Every bound here exceeds the truth with probability at most `alpha` when its assumptions hold, so a bound above the claim
refutes the claim. The suite and the audit use alpha = 1e-6 an attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    """The outcomes of a distinguishing game: runs with and without a canary, which the attacker has to tell apart.

    Args:
        hits: Runs with the canary that the attacker took for such.
        with_canary: All runs with it.
        false_alarms: Runs without the canary that the attacker took for runs with it.
        without_canary: All runs without it.
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


def noise_bound(squares: float, number: int, alpha: float = ALPHA) -> float:
    """Return a lower bound of mu from the noise itself (T1): C over the largest standard deviation that it may have.

    s_hi = sqrt(sum(x²)/chi²_{alpha, n}); mu_lb = 1/s_hi.

    Args:
        squares: Sum of the squares of n coordinates of noise, in units of C.
        number: n.
        alpha: Chance to exceed the truth.

    Guarantee:
        Exceeds the mu of adding or removing a vector of norm C along these coordinates with probability at most alpha, when
        their noise is normal and independent.

    Edge cases:
        0 without coordinates. Without any noise: 1e6, since JSON has no infinity.
    """
    if number == 0:
        return 0.0
    quantile = float(stats.chi2.ppf(alpha, number))
    return min(LARGEST_MU, math.sqrt(quantile / squares)) if squares > 0 else LARGEST_MU


def correlation_limit(size: int, alpha: float) -> float:
    """Return what the correlation of two independent normal vectors `[size]` exceeds with probability alpha, either way.

    r² follows Beta(1/2, (size − 1)/2), whatever the vectors' scales are. Vectors of one value always correlate: 1.
    """
    return math.sqrt(float(stats.beta.isf(alpha, 0.5, (size - 1) / 2))) if size > 1 else 1.0


def distance_limit(number: int, alpha: float) -> float:
    """Return what the distance of an empirical distribution from the true one exceeds with probability at most alpha.

    Dvoretzky, Kiefer and Wolfowitz 1956, with the constant of Massart 1990.
    """
    return math.sqrt(math.log(2 / alpha) / (2 * number))


class TradeOff:
    """A trade-off function (Dong et al. 2019), below that of every mechanism which is (epsilon, delta)-DP for all pairs given.

    f(x) = max over pairs of max(0, 1 − delta − e^eps·x, e^−eps·(1 − delta − x)).

    Args:
        pairs: (epsilon, delta), epsilon ≥ 0. More pairs give a sharper function; none gives 0.
    """

    def __init__(self, pairs: Sequence[tuple[float, float]]) -> None:
        finite = [pair for pair in pairs if math.isfinite(pair[0])]
        self._slopes = np.exp(np.array([epsilon for epsilon, _ in finite]))
        self._tops = 1.0 - np.array([delta for _, delta in finite])

    def __call__(self, level: float) -> float:
        """Return the smallest type II error at a type I error of `level`."""
        lines = np.concatenate([self._tops - self._slopes * level, (self._tops - level) / self._slopes])
        return max(0.0, float(lines.max(initial=0.0)))


def one_run_possible(
    trade_off: Callable[[float], float], canaries: int, guesses: int, right: int, alpha: float
) -> bool:
    """Tell whether an f-DP mechanism can let an attacker guess `right` or more with probability alpha (T6).

    Let p_v be the probability of v right guesses of r, A_i = sum_{v≥i} v·p_v/m and B_i = sum_{v≥i} (r−v)·p_v/m: the chance
    that a random one of m canaries is guessed rightly (wrongly) while at least i guesses are right. Exchanging that canary
    turns one event into the other with i − 1, so that B_{i−1} ≥ f(1 − A_i) by f-DP and Jensen's inequality. From the least
    possible A and B at `right`, the recursion goes down to 0; more than all probability there is impossible (Mahloujifar,
    Melis and Chaudhuri 2024, "Auditing f-differential privacy in one run").

    Args:
        trade_off: f, symmetric, of exchanging "in" for "out" of one canary.
        canaries: m, each included with probability 1/2.
        guesses: r, how many the attacker guessed (the number was fixed beforehand).
        right: How many guesses were right.
        alpha: The probability in question.
    """
    correct = alpha * right / canaries
    wrong = alpha * (guesses - right) / canaries
    everything = guesses / canaries
    for number in range(right - 1, -1, -1):
        needed = max(wrong, trade_off(1.0 - correct))
        correct += number / (guesses - number) * (needed - wrong)
        wrong = needed
        if correct + wrong > everything:
            return False
    return True


def one_run_limit(trade_off: Callable[[float], float], canaries: int, guesses: int, alpha: float = ALPHA) -> int:
    """Return the most right guesses that f-DP allows but for a probability below alpha; `guesses` when it allows all (T6).

    Guarantee:
        A mechanism that is f-DP for each canary lets an attacker guess more rightly with probability at most alpha.
    """
    low, high = 0, guesses + 1  # `low` right guesses are possible, `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        possible = one_run_possible(trade_off, canaries, guesses, middle, alpha)
        low, high = (middle, high) if possible else (low, middle)
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
