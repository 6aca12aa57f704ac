"""The statistical checks at alpha = .05 over fresh seeds: honest noise is not rejected more often than that allows.

Each test: observed alarms within the 99.9 % bound of Bin(trials, .05), so a correct check fails here with probability .001
over the choice of seeds; the seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fedray.privacy.noise import LocalNoise, aggregate_noise
from tests.privacy import checks
from tests.privacy.proofs.sampler import draws_of
from tests.privacy.worlds import keys_of, spec_of

ALPHA = 0.05
TRIALS = 100


def count_alarms(trial: Callable[[int], None], trials: int = TRIALS) -> int:
    """Return how many of the seeds the check rejects."""
    alarms = 0
    for seed in range(trials):
        try:
            trial(1000 + seed)
        except AssertionError:
            alarms += 1
    return alarms


def noise_of(seed: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return local noise of a fresh run."""
    out = np.empty((1, size), np.float32)
    LocalNoise(spec_of("sample"), keys_of(seed), [seed % 7]).fill(seed % 5, out)
    return out[0]


STD = spec_of("sample").noise_std


@pytest.mark.parametrize("check", [checks.check_noise_variance, checks.check_noise_shape])
def test_noise_checks_have_their_level(check: Callable[[np.ndarray, float, float], None]) -> None:
    """T1 at alpha = .05, 100 seeds, 20 000 local noise coordinates each."""
    checks.check_false_alarms(count_alarms(lambda seed: check(noise_of(seed, 20_000), STD, ALPHA)), TRIALS, ALPHA)


@pytest.mark.parametrize("check", [checks.check_noise_variance, checks.check_noise_shape])
def test_aggregate_noise_checks_have_their_level(check: Callable[[np.ndarray, float, float], None]) -> None:
    """T1 at alpha = .05, 100 seeds, 20 000 aggregate noise coordinates each."""
    alarms = count_alarms(
        lambda seed: check(aggregate_noise(spec_of("gateway"), keys_of(seed), ((0, 9),), 20_000), STD, ALPHA)
    )
    checks.check_false_alarms(alarms, TRIALS, ALPHA)


def test_independence_check_has_its_level() -> None:
    """T2 at alpha = .05, 100 seeds, 12 vectors of length 1000 each."""

    def trial(seed: int) -> None:
        rows = np.empty((4, 1000), np.float32)
        noise = LocalNoise(spec_of("sample"), keys_of(seed), range(4))
        vectors = []
        for step in range(3):
            noise.fill(step, rows)
            vectors.append(rows.copy())
        checks.check_independence(np.concatenate(vectors), ALPHA)

    checks.check_false_alarms(count_alarms(trial), TRIALS, ALPHA)


@pytest.mark.parametrize("check", [checks.check_record_counts, checks.check_batch_sizes])
@pytest.mark.parametrize("num_records", [200, 20])
def test_sampler_checks_have_their_level(check: Callable[..., None], num_records: int) -> None:
    """T3 at alpha = .05, 60 seeds, 1000 draws each."""
    spec = spec_of("sample", sample_rate=0.1)
    alarms = count_alarms(lambda seed: check(draws_of(spec, num_records, 1000, seed), 0.1, ALPHA), 60)
    checks.check_false_alarms(alarms, 60, ALPHA)


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_noise_checks_reject_other_sizes(factor: float) -> None:
    """T1's power: two thirds and three halves of the noise are rejected at alpha = 1e-6 by each statistic, in 10 of 10."""
    for check in (checks.check_noise_variance, checks.check_noise_shape):
        assert count_alarms(lambda seed, check=check: check(factor * noise_of(seed, 120_000), STD), 10) == 10


def test_false_alarm_bound_rejects_a_check_that_is_too_eager() -> None:
    """The bound itself fails when a check rejects three times too often."""
    with pytest.raises(AssertionError):
        checks.check_false_alarms(17, TRIALS, ALPHA)
