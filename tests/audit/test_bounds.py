"""The audit's statistics: known values, and Gaussian mechanisms of known noise that must be accepted or refuted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedray.audit import power
from fedray.audit.bounds import (
    ALPHA,
    LARGEST_MU,
    Counts,
    Scores,
    area_under_curve,
    binomial_lower,
    binomial_upper,
    canary_gateways_mu,
    count,
    game_bound,
    gaussian_bound,
    one_run_epsilon,
    one_run_p_value,
)

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


def test_one_run_epsilon_matches_the_closed_form_of_pure_privacy() -> None:
    """At delta 0 and all guesses right, p = q^r, so eps = logit(alpha^(1/r)) (Steinke et al. 2023, Theorem 5.2)."""
    rate = 0.05 ** (1 / 100)
    assert one_run_epsilon(100, 100, 100, 0.0, alpha=0.05) == pytest.approx(math.log(rate / (1 - rate)), abs=1e-5)


def test_one_run_p_value_adds_what_delta_allows() -> None:
    """For r = v = 1: beta = q, a = 1 − q, so p = q + 2·m·delta·(1 − q)."""
    rate = 1 / (1 + math.exp(-1.0))
    assert one_run_p_value(10, 1, 1, 1.0, 1e-3) == pytest.approx(rate + 2 * 10 * 1e-3 * (1 - rate))


def test_one_run_epsilon_is_zero_with_a_delta_that_is_too_large() -> None:
    assert one_run_epsilon(1000, 200, 200, 1e-5) == 0.0
    assert one_run_epsilon(1000, 200, 200, 1e-12) > 2.5


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_one_run_accepts_randomised_response_and_rejects_twice_its_epsilon(epsilon: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        honest = int((rng.random(2000) < 1 / (1 + math.exp(-epsilon))).sum())
        broken = int((rng.random(2000) < 1 / (1 + math.exp(-2 * epsilon))).sum())
        assert one_run_epsilon(2000, 2000, honest, 1e-12) <= epsilon
        assert one_run_epsilon(2000, 2000, broken, 1e-12) > epsilon


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


def test_game_leak_is_caught_and_a_smaller_one_is_missed() -> None:
    leak = power.game_leak(1.0, RUNS, RUNS)
    assert leak is not None
    assert leak == pytest.approx(1.25, abs=0.05)  # privacy.md: n = 5000 at mu = 1 catches 1.25× with power .99
    caught = sum(_game(leak, 1.0, seed) > 1.0 for seed in range(200))
    missed = sum(_game(1 + (leak - 1) / 3, 1.0, seed) <= 1.0 for seed in range(50))
    assert caught >= 194
    assert missed > 25


def test_gaussian_leak_is_caught() -> None:
    leak = power.gaussian_leak(1.0, 1000, 10_000)
    assert leak is not None
    assert 1.2 < leak < 1.4
    assert sum(_pooled(1 / leak, seed) > 1.0 for seed in range(200)) >= 194


def test_leaks_are_none_where_nothing_would_be_caught() -> None:
    assert power.game_leak(10.0, RUNS, RUNS) is None  # more than so many runs can prove
    assert power.one_run_leak(100.0, 1000, 200, 1e-12) is None


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
