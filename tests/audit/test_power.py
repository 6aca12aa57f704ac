"""Each attack, played 500 times at the smallest leak that it says it catches with probability .99."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from fedray.audit import power
from fedray.audit.bounds import (
    ALPHA,
    Scores,
    TradeOff,
    count,
    distance_limit,
    game_bound,
    gaussian_bound,
    one_run_limit,
)
from fedray.audit.releases import Place, neighbouring
from fedray.audit.reuse import largest_correlation, sizes_and_alphas
from fedray.audit.sampler import Draws, dependence, largest_rate, share_bound, share_inside
from fedray.audit.scale import distance_from_normal, smallest_noise
from fedray.privacy.accounting import epsilon_of
from fedray.privacy.levels import Event

PLAYS = 500
ENOUGH = int(stats.binom.ppf(1e-3, PLAYS, power.POWER))  # 487: fewer would refute the stated power
CARELESS = 0.05
ALARMS = int(stats.binom.isf(1e-3, 400, CARELESS))  # 34 of 400


def _leak(found: float | None) -> float:
    assert found is not None
    return found


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("claim", "effect"), [(1.0, 1.0), (0.5, 1.0), (1.4, 0.8), (3.0, 1.0)])
def test_game_power_holds(claim: float, effect: float) -> None:
    runs = 5000
    leak, rng = _leak(power.game_leak(claim, runs, runs, effect)), _rng(1)
    scale = 1 / (claim * leak)
    caught = sum(
        game_bound(count(effect + scale * rng.standard_normal(runs), scale * rng.standard_normal(runs), effect / 2))
        > claim
        for _ in range(PLAYS)
    )
    assert caught >= ENOUGH


@pytest.mark.parametrize(("canaries", "free"), [(1000, 10_000), (26_880, 44_100)])
def test_gaussian_power_holds(canaries: int, free: int) -> None:
    leak, rng = _leak(power.gaussian_leak(1.0, canaries, free)), _rng(2)
    caught = 0
    for _ in range(PLAYS):
        squares = float(rng.chisquare(free)) / leak**2
        total = canaries + math.sqrt(canaries) / leak * float(rng.standard_normal())
        caught += gaussian_bound(Scores(canaries=canaries, total=total, free=free, free_squares=squares)) > 1.0
    assert caught >= ENOUGH


@pytest.mark.parametrize(("releases", "size"), [(12, 676), (96, 40)])
def test_noise_power_holds(releases: int, size: int) -> None:
    leak, rng = _leak(power.noise_leak(releases * size, ALPHA / 3)), _rng(3)
    tensors = {"all but ten": slice(0, size - 10), "ten": slice(size - 10, size)}
    caught = sum(smallest_noise(_normal(rng, releases, size) / leak, tensors)[0] > 1.0 for _ in range(PLAYS))
    assert caught >= ENOUGH


def _normal(rng: np.random.Generator, releases: int, size: int) -> npt.NDArray[np.float32]:
    return rng.standard_normal((releases, size)).astype(np.float32)


def test_shape_power_holds() -> None:
    """Noise that is 0 with probability w lies w/2 from the normal distribution of its scale."""
    number = 5000
    leak, rng = _leak(power.shape_leak(number)), _rng(4)
    caught = 0
    for _ in range(PLAYS):
        values = rng.standard_normal(number) * (rng.random(number) >= 2 * leak)
        caught += distance_from_normal(values.astype(np.float32)) > 0
    assert caught >= ENOUGH


def _places(rounds: int, attempts: int, gateways: int, steps: int) -> list[Place]:
    return [
        Place(r + 1, a, o, g, s)
        for r in range(rounds)
        for a, o in [*((a, 0) for a in range(attempts)), (0, 1)]
        for g in range(gateways)
        for s in range(steps)
    ]


@pytest.mark.parametrize("size", [5, 60, 1000])
@pytest.mark.parametrize("forgotten", Place._fields)
def test_correlation_power_holds(size: int, forgotten: str) -> None:
    """One coordinate is partly forgotten by the key: noises that differ in it alone correlate."""
    places = _places(2, 2, 4, 4)
    leak = _leak(power.correlation_leak(sizes_and_alphas(dict.fromkeys(places, np.zeros(size, np.float32)))))
    rng, caught = _rng(5), 0
    for _ in range(PLAYS):
        shared = {place._replace(**{forgotten: 0}): rng.standard_normal(size) for place in places}
        noise = {
            place: (
                math.sqrt(leak) * shared[place._replace(**{forgotten: 0})]
                + math.sqrt(1 - leak) * rng.standard_normal(size)
            ).astype(np.float32)
            for place in places
        }
        caught += largest_correlation(noise)[0] > 0
    assert caught >= ENOUGH


def test_correlations_of_two_tiny_vectors_are_powerless() -> None:
    few = dict.fromkeys(_places(1, 2, 1, 1), np.zeros(3, np.float32))
    assert power.correlation_leak(sizes_and_alphas(few)) is None


def _draws(rng: np.random.Generator, places: list[Place], size: int, rate: float, claimed: float) -> Draws:
    return Draws(
        drawn={place: np.flatnonzero(rng.random(size) < rate) for place in places},
        sizes=dict.fromkeys({place.gateway for place in places}, size),
        rate=claimed,
    )


@pytest.mark.parametrize(("size", "rate"), [(256, 1 / 16), (40, 0.25)])
def test_rate_power_holds(size: int, rate: float) -> None:
    places = _places(2, 2, 2, 4)
    leak, rng = _leak(power.rate_leak(rate, len(places) * size)), _rng(6)
    caught = sum(largest_rate(_draws(rng, places, size, leak * rate, rate)) > rate for _ in range(PLAYS))
    assert caught >= ENOUGH


@pytest.mark.parametrize("together", ["round", "attempt"])
def test_dependence_power_holds(together: str) -> None:
    """Neighbouring draws of one coordinate share more records than independent ones; each draw alone is as it should be."""
    places, size, rate = _places(2, 2, 2, 4), 256, 1 / 16
    pairs = neighbouring(places)
    leak = _leak(power.dependence_leak(rate, [len(found) * size for found in pairs.values()]))
    repeats = (leak - 1) * rate / (1 - rate)  # chance that a record's second coin is a copy of its first
    rng, caught = _rng(7), 0
    for _ in range(PLAYS):
        coins = {place: rng.random(size) < rate for place in places}
        for one, other in pairs[together]:
            coins[other] = np.where(rng.random(size) < repeats, coins[one], coins[other])
        draws = Draws(
            drawn={place: np.flatnonzero(coin) for place, coin in coins.items()},
            sizes={0: size, 1: size},
            rate=rate,
        )
        caught += dependence(draws)[0] > 1.0
    assert caught >= ENOUGH


def test_share_power_holds() -> None:
    leak, rng = _leak(power.share_leak(96)), _rng(8)
    caught = sum(share_bound(int(rng.binomial(96, leak / 2)), 96) > 0.5 for _ in range(PLAYS))
    assert caught >= ENOUGH


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(4.0, 0.1, 100), (8.0, 1.0, 10)])
def test_one_run_power_holds(sigma: float, rate: float, steps: int) -> None:
    """The attack itself: scores of canaries under Poisson sampling, the highest and lowest guessed."""
    canaries, each = 4000, 200
    deltas = np.concatenate([np.geomspace(1e-14, 1e-3, 24), np.geomspace(1e-3, 0.5, 40)])
    event = Event(noise_multiplier=sigma, rate=rate, per="step")
    trade_off = TradeOff([(epsilon_of(event, steps, float(delta)), float(delta)) for delta in deltas])
    limit = one_run_limit(trade_off, canaries, 2 * each)
    leak, rng = _leak(power.one_run_leak(sigma, rate, steps, canaries, each, limit)), _rng(9)
    assert leak < 5
    caught = 0
    for _ in range(PLAYS):
        inside = rng.random(canaries) < 0.5
        noise = sigma / leak * math.sqrt(steps) * rng.standard_normal(canaries)
        order = np.argsort(inside * rng.binomial(steps, rate, canaries) + noise)
        caught += int(inside[order[-each:]].sum() + (~inside[order[:each]]).sum()) > limit
    assert caught >= ENOUGH


def test_leaks_are_none_where_nothing_would_be_caught() -> None:
    assert power.game_leak(10.0, 5000, 5000) is None  # more than so many runs can prove
    assert power.rate_leak(1.0, 10_000) is None  # full batches
    assert power.rate_leak(0.5, 10) is None  # too few coins
    assert power.dependence_leak(0.5, [10]) is None
    assert power.dependence_leak(0.5, []) is None
    assert power.share_leak(10) is None
    assert power.shape_leak(10) is None
    assert power.noise_leak(1) is None
    assert power.one_run_leak(1.0, 1.0, 10, 1000, 100, 200) is None  # all guesses may be right


def test_smaller_leaks_are_missed() -> None:
    """The stated leaks are the smallest: a third of the way to them little is caught."""
    leak, rng = _leak(power.game_leak(1.0, 5000, 5000)), _rng(10)
    mu = 1 + (leak - 1) / 3
    caught = sum(
        game_bound(count(1 + rng.standard_normal(5000) / mu, rng.standard_normal(5000) / mu, 0.5)) > 1.0
        for _ in range(100)
    )
    assert caught < 10


def test_attacks_keep_their_false_alarm_rate() -> None:
    """At alpha = .05 over 400 seeds each attack alarms at most as often as its binomial 99.9 % bound allows."""
    places = _places(2, 2, 2, 2)
    tensors = {"first": slice(0, 20), "second": slice(20, 30)}
    alarms = dict.fromkeys(("noise", "shape", "correlation", "rate", "dependence", "spread"), 0)
    for seed in range(400):
        rng = _rng(1000 + seed)
        noise = _normal(rng, len(places), 30)
        alarms["noise"] += smallest_noise(noise, tensors, CARELESS)[0] > 1.0
        alarms["shape"] += distance_from_normal(noise.reshape(-1), CARELESS) > 0
        alarms["correlation"] += largest_correlation(dict(zip(places, noise, strict=True)), CARELESS)[0] > 0
        draws = _draws(rng, places, 50, 0.2, 0.2)
        alarms["rate"] += largest_rate(draws, CARELESS) > 0.2
        alarms["dependence"] += dependence(draws, CARELESS)[0] > 1.0
        alarms["spread"] += share_bound(share_inside(draws, rng), len(places), CARELESS) > 0.5
    assert {name: number for name, number in alarms.items() if number > ALARMS} == {}
    assert distance_limit(100, CARELESS) == pytest.approx(0.1358, abs=1e-4)  # 1.358/sqrt(n), as in tables
