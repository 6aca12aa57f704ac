"""The digits: real images, a fixed split."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from fedray.config.settings import RunConfig
from fedray.data import digits
from fedray.data.source import load, wanted_of
from fedray.tasks.classification import Classification


def test_load_gives_images_in_the_unit_interval() -> None:
    (x, y), (test_x, test_y) = digits.load()
    assert (x.shape, test_x.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (x.dtype, y.dtype) == (np.float32, np.int64)
    assert (x.min(), x.max()) == (0.0, 1.0)
    assert set(test_y) == set(range(10))


def test_load_splits_scikit_learns_records_once() -> None:
    (x, y), (test_x, test_y) = digits.load()
    ours = np.concatenate([np.column_stack([x.reshape(-1, 64), y]), np.column_stack([test_x.reshape(-1, 64), test_y])])
    bunch = load_digits()
    theirs = np.column_stack([bunch.data / 16, bunch.target])
    assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)].astype(np.float32))


def test_load_partitions_digits_by_the_setup_key() -> None:
    config = RunConfig().resolve(dataset="digits", gateways=20, batch_size=64)
    one, same, other = (
        load("digits", wanted_of(config, Classification(), key)) for key in (bytes(32), bytes(32), b"1" * 32)
    )
    assert np.array_equal(one.shards[3][1], same.shards[3][1])
    assert not np.array_equal(one.shards[3][1], other.shards[3][1])
    assert one.nominal_records == 1437 // 20
    assert one.disjoint
