"""The toy data: what its statistics must be, and that no seed changes it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from fedray.config.settings import RunConfig
from fedray.data import toy
from fedray.data.source import Federation, load, wanted_of
from fedray.tasks.classification import Classification


def _toy(config: RunConfig, key: bytes) -> Federation:
    return load("toy", wanted_of(config, Classification(), key))


def test_hadamard_is_sylvesters() -> None:
    assert np.array_equal(toy.hadamard(16), scipy.linalg.hadamard(16))


def test_held_out_has_4000_records_of_four_classes() -> None:
    x, y = toy.held_out()
    assert (x.shape, x.dtype, y.dtype) == ((4000, 16), np.float32, np.int64)
    assert (np.abs(np.bincount(y) - 1000) < 4 * np.sqrt(4000 * 0.25 * 0.75)).all()


def test_shards_have_the_stated_means_and_unit_variance() -> None:
    x, y = toy.ToyShards(1, 40_000)[0]
    for label in range(4):
        members = x[y == label]
        centre = 0.7 * scipy.linalg.hadamard(16)[label]
        assert np.abs(members.mean(axis=0) - centre).max() < 5 / np.sqrt(len(members))
        assert np.abs(members.var(axis=0) - 1).max() < 5 * np.sqrt(2 / len(members))
        covariance = np.cov(members.T) - np.diag(members.var(axis=0))
        assert np.abs(covariance).max() < 5 / np.sqrt(len(members))


def test_held_out_has_a_bayes_optimum_of_94_percent() -> None:
    x, y = toy.held_out()
    best = (x @ scipy.linalg.hadamard(16)[:4].T).argmax(axis=1)
    assert abs((best == y).mean() - 0.94) < 0.015


def test_shards_of_two_gateways_differ() -> None:
    shards = toy.ToyShards(2, 64)
    assert not np.array_equal(shards[0][0], shards[1][0])


def test_shards_are_the_same_every_time() -> None:
    one, other = toy.ToyShards(3, 64)[2], toy.ToyShards(300, 64)[2]
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])


def test_shards_do_not_depend_on_the_seed() -> None:
    one, other = (_toy(RunConfig().resolve(seed=seed), bytes([seed]) * 32) for seed in (0, 1))
    assert np.array_equal(one.shards[5][0], other.shards[5][0])
    assert one.test is not None
    assert other.test is not None
    assert np.array_equal(one.test[0], other.test[0])


def test_shards_differ_from_the_held_out_records() -> None:
    x, _ = toy.ToyShards(1, 4000)[0]
    assert not np.isin(x[:, 0], toy.held_out()[0][:, 0]).any()


def test_shards_skew_labels_under_dirichlet() -> None:
    skewed, even = toy.ToyShards(20, 1000, alpha=0.1), toy.ToyShards(20, 1000)
    most = [[np.bincount(shards[i][1]).max() / 1000 for i in range(20)] for shards in (skewed, even)]
    assert np.mean(most[0]) > 0.7
    assert np.mean(most[1]) < 0.3


def test_shards_end() -> None:
    with pytest.raises(IndexError):
        _ = toy.ToyShards(2, 8)[2]


def test_shards_default_to_4096_records() -> None:
    assert _toy(RunConfig(), bytes(32)).nominal_records == 4096
    assert _toy(RunConfig().resolve(samples_per_gateway=100), bytes(32)).nominal_records == 100
