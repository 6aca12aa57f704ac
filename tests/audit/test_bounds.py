"""The audit's statistics: known values, and Gaussian mechanisms of known noise that must be accepted or refuted."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from fedray.audit.bounds import (
    ALPHA,
    LARGEST_MU,
    Counts,
    Scores,
    TradeOff,
    area_under_curve,
    binomial_lower,
    binomial_upper,
    canary_gateways_mu,
    correlation_limit,
    count,
    game_bound,
    gaussian_bound,
    noise_bound,
    one_run_limit,
)
from fedray.privacy.accounting import gaussian_delta

RUNS = 5000


def test_binomial_bounds_match_published_values() -> None:
    """Clopper–Pearson 95 % two-sided for 8 of 10: (0.4439, 0.9748); for 0 of 10 the upper bound is 1 − 0.025^(1/10)."""
    assert binomial_lower(8, 10, 0.025) == pytest.approx(0.4439, abs=1e-4)
    assert binomial_upper(8, 10, 0.025) == pytest.approx(0.9748, abs=1e-4)
    assert binomial_upper(0, 10, 0.025) == pytest.approx(1 - 0.025**0.1)
    assert binomial_lower(10, 10, 0.025) == pytest.approx(0.025**0.1)


def test_binomial_bounds_are_trivial_at_the_ends() -> None:
    assert binomial_lower(0, 10, 0.05) == 0.0
    assert binomial_upper(10, 10, 0.05) == 1.0


def test_game_bound_is_at_most_what_so_many_runs_can_prove() -> None:
    """5000 runs that are all won prove mu = 5.5 at alpha 1e-6 and no more."""
    won = Counts(hits=RUNS, with_canary=RUNS, false_alarms=0, without_canary=RUNS)
    assert game_bound(won) == pytest.approx(5.5, abs=0.1)


def test_game_bound_of_a_coin_is_zero() -> None:
    assert game_bound(Counts(hits=2500, with_canary=RUNS, false_alarms=2500, without_canary=RUNS)) == 0.0


def _game(mu: float, claim: float, seed: int) -> float:
    """Return the bound of a Gaussian mechanism with this mu, threshold fixed from the claim's signal alone."""
    rng = np.random.default_rng(seed)
    noise = 1 / mu
    return game_bound(count(1 + noise * rng.standard_normal(RUNS), noise * rng.standard_normal(RUNS), 0.5))


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0, 3.0])
def test_game_accepts_the_right_noise_and_rejects_half_of_it(mu: float) -> None:
    for seed in range(20):
        assert _game(mu, mu, seed) <= mu
        assert _game(2 * mu, mu, seed) > mu


def _pooled(sigma: float, seed: int, canaries: int = 1000, free: int = 10_000) -> float:
    rng = np.random.default_rng(seed)
    scores = Scores()
    scores.add(1 + sigma * rng.standard_normal(canaries), sigma * rng.standard_normal(free))
    return gaussian_bound(scores)


def test_gaussian_bound_accepts_the_right_noise_and_always_rejects_half_of_it() -> None:
    for seed in range(100):
        assert _pooled(1.0, seed) <= 1.0
        assert _pooled(0.5, seed) > 1.0


def test_gaussian_bound_flags_four_fifths_of_the_noise_in_most_runs() -> None:
    """privacy.md: K = 1000 and n = 10 000 flag 0.8 times the noise in 96 % of runs."""
    flagged = sum(_pooled(0.8, seed) > 1.0 for seed in range(200))
    assert 180 <= flagged <= 199


def test_gaussian_bound_does_not_use_the_claim() -> None:
    """Scores in other units of noise give the same bound: only the canary's own mean and the free directions count."""
    rng = np.random.default_rng(0)
    with_canary, free = 1 + rng.standard_normal(1000), rng.standard_normal(10_000)
    bounds = []
    for unit in (1.0, 7.0):
        scores = Scores()
        scores.add(unit * with_canary, unit * free)
        bounds.append(gaussian_bound(scores))
    assert bounds[0] == pytest.approx(bounds[1])


def test_gaussian_bound_of_no_noise_is_a_finite_number() -> None:
    scores = Scores()
    scores.add(np.ones(10), np.zeros(10))
    assert gaussian_bound(scores) == LARGEST_MU


def test_gaussian_bound_without_scores_is_zero() -> None:
    assert gaussian_bound(Scores()) == 0.0


def test_noise_bound_is_the_inverse_of_the_largest_standard_deviation() -> None:
    """n values whose squares add up to n·s² prove mu ≥ sqrt(chi²_{alpha, n}/n)/s: 0.9675 for n = 10 000 at alpha 1e-6."""
    assert noise_bound(10_000.0, 10_000) == pytest.approx(0.9666, abs=2e-3)
    assert noise_bound(40_000.0, 10_000) == pytest.approx(0.9666 / 2, abs=1e-3)


def test_noise_bound_of_no_noise_is_a_finite_number_and_of_nothing_zero() -> None:
    assert noise_bound(0.0, 10) == LARGEST_MU
    assert noise_bound(0.0, 0) == 0.0


def test_correlation_limit_matches_the_t_distribution() -> None:
    """r·sqrt((d − 1)/(1 − r²)) follows Student's t with d − 1 degrees of freedom when no mean is taken off."""
    limit = correlation_limit(11, 0.01)
    assert limit * math.sqrt(10 / (1 - limit**2)) == pytest.approx(3.169, abs=1e-3)
    assert correlation_limit(1, 0.01) == 1.0


def _gaussian(mu: float) -> Callable[[float], float]:
    return lambda level: float(stats.norm.cdf(stats.norm.isf(level) - mu))


def test_trade_off_of_pairs_lies_below_the_gaussian_and_comes_close() -> None:
    mu = 0.7
    trade_off = TradeOff([(epsilon, gaussian_delta(epsilon, mu)) for epsilon in np.linspace(0, 8, 200)])
    for level in (1e-4, 0.01, 0.2, 0.5, 0.9):
        assert trade_off(level) <= _gaussian(mu)(level) + 1e-12
        assert trade_off(level) == pytest.approx(_gaussian(mu)(level), abs=2e-3)


def test_trade_off_without_pairs_promises_nothing() -> None:
    assert TradeOff([])(0.1) == 0.0
    assert TradeOff([(math.inf, 1e-9)])(0.1) == 0.0


def test_one_run_of_perfect_privacy_allows_what_coins_do() -> None:
    """f(x) = 1 − x: nobody guesses better than a coin; the limit is near the binomial quantile, never below it."""
    limit = one_run_limit(lambda level: 1 - level, 1000, 1000, alpha=0.05)
    quantile = int(stats.binom.isf(0.05, 1000, 0.5))
    assert quantile <= limit <= 1.03 * quantile


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_one_run_never_flags_randomised_response_more_often_than_alpha(epsilon: float) -> None:
    """The best epsilon-DP mechanism for guesses: the binomial tail beyond the limit is at most alpha."""
    rate = 1 / (1 + math.exp(-epsilon))
    for alpha in (0.05, 1e-6):
        limit = one_run_limit(TradeOff([(epsilon, 0.0)]), 2000, 2000, alpha)
        assert stats.binom.sf(limit, 2000, rate) <= alpha
        assert limit <= 1.05 * stats.binom.isf(alpha, 2000, rate)


def test_one_run_limits_grow_with_what_is_claimed() -> None:
    limits = [one_run_limit(_gaussian(mu), 1000, 200) for mu in (0.1, 0.5, 1.0, 5.0)]
    assert limits == sorted(limits)
    assert limits[-1] == 200, "all guesses may be right"


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_canary_gateways_estimate_the_mu_of_a_gaussian_sum(sigma: float) -> None:
    """Andrew et al. 2023: canaries on the sphere in one noised sum; the interval holds 1/sigma when canaries are few."""
    rng = np.random.default_rng(2)
    size, number = 20_000, 20
    units = rng.standard_normal((number, size))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    released = units.sum(axis=0) + sigma * rng.standard_normal(size)
    mu, low, high = canary_gateways_mu(units @ released / np.linalg.norm(released), size)
    assert low <= mu <= high
    assert low <= 1 / sigma <= high


def test_area_under_curve_counts_ties_half() -> None:
    assert area_under_curve(np.array([2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.5)
    assert area_under_curve(np.array([9.0]), np.array([1.0, 2.0])) == 1.0


def test_bounds_keep_their_false_alarm_rate() -> None:
    """At alpha = .05 over 400 seeds each test alarms at most as often as its binomial 99.9 % bound allows."""
    limit = 36  # binom.ppf(.999, 400, .05) = 34, and the statistics are discrete
    game = pooled = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        counts = count(1 + rng.standard_normal(500), rng.standard_normal(500), 0.5)
        game += game_bound(counts, alpha=0.05) > 1.0
        scores = Scores()
        scores.add(1 + rng.standard_normal(200), rng.standard_normal(500))
        pooled += gaussian_bound(scores, alpha=0.05) > 1.0
    assert game <= limit
    assert pooled <= limit
    assert ALPHA == 1e-6
