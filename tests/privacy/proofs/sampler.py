"""Proofs of the sampler (T3): who is in a batch, and that an empty batch is a step."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedray.privacy.sampling import PoissonSampler
from fedray.privacy.spec import PrivacySpec
from tests.privacy import checks
from tests.privacy.proofs.releases import releases_are_as_declared
from tests.privacy.worlds import (
    keys_of,
    observe,
    random_shard,
    spec_of,
    training_of,
    wide_model,
)


def draws_of(spec: PrivacySpec, num_records: int, draws: int, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Return `[T, N]`: who was in which batch; draws go over steps, gateways, rounds and attempts."""
    drawn = np.zeros((draws, num_records), np.bool_)
    steps, row = 100, 0
    while row < draws:
        block = row // steps
        keys = keys_of(seed, 1 + block % 4, attempt=block % 3)
        sampler = PoissonSampler(spec, keys, gateway=block)
        for step in range(min(steps, draws - row)):
            drawn[row, sampler.batch(step, num_records)] = True
            row += 1
    return drawn


def sampler_law(num_records: int) -> None:
    """T3: 20 000 draws at q = .1 give every record its rate, and batch sizes the variance of Poisson sampling."""
    rate = 0.1
    drawn = draws_of(spec_of("sample", sample_rate=rate), num_records, 20_000)
    checks.check_record_counts(drawn, rate)
    checks.check_batch_sizes(drawn, rate)
    empty, expected = (~drawn.any(axis=1)).mean(), (1 - rate) ** num_records
    assert abs(empty - expected) <= 4.9 * math.sqrt(expected * (1 - expected) / 20_000) + 1e-9
    # Different gateways, steps, rounds and attempts draw on their own.
    half = spec_of("sample", sample_rate=0.5)
    rows = [
        draws_of(half, 4000, 6, seed=5),
        *(
            _inclusion(PoissonSampler(half, keys_of(5, index, attempt), gateway).batch(step, 4000), 4000)
            for index, attempt in ((1, 1), (2, 0))
            for gateway in (0, 1, 7)
            for step in (0, 1)
        ),
    ]
    checks.check_independence(np.concatenate([np.atleast_2d(row) for row in rows]) - 0.5)


def _inclusion(batch: npt.NDArray[np.int64], num_records: int) -> npt.NDArray[np.bool_]:
    drawn = np.zeros(num_records, np.bool_)
    drawn[batch] = True
    return drawn


def empty_batches_are_steps(engine: str, level: str) -> None:
    """T3, N = 20, q = .1: an eighth of the batches are empty, and these release nothing but full noise."""
    spec = spec_of(level, sample_rate=0.1, batch_size=2, local_steps=250)
    observed = observe(
        engine, wide_model(60), training_of(spec, lr=1e-3), {0: random_shard(20, num_outputs=10)}, keys_of(6)
    )
    releases_are_as_declared(observed, spec)
    empty = [seen for seen in observed.steps.values() if len(seen.release.batch) == 0]
    assert 10 <= len(empty) <= 60, f"{len(empty)} of 250 batches are empty, 30 are expected"
    assert all(not seen.release.clipped.any() for seen in empty)
    checks.check_noise_law(np.stack([seen.noise for seen in empty]), spec.noise_std)
