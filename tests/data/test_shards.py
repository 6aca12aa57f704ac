"""Checking records, and the bounded cache of shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedray.data.shards import CutShards, RecordRules, ShardCache, as_arrays
from fedray.errors import InputError
from fedray.gateway import Gateway

RULES = RecordRules.of(np.zeros((1, 2), np.float32), 2)


class Counted:
    """Shards of 10 records (160 bytes) that remember how often each was loaded."""

    def __init__(self) -> None:
        self.loads: list[int] = []

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.loads.append(index)
        return np.full((10, 2), index, np.float32), np.zeros(10, np.int64)


def test_cache_loads_only_what_is_asked_for() -> None:
    source = Counted()
    cache = ShardCache(source, RULES)
    assert source.loads == []
    assert cache[3].x[0, 0] == 3
    assert source.loads == [3]


def test_cache_keeps_what_it_loaded() -> None:
    source = Counted()
    cache = ShardCache(source, RULES)
    assert cache[1] is cache[1]
    assert source.loads == [1]


def test_cache_drops_the_least_recently_used_past_its_bound() -> None:
    source = Counted()
    cache = ShardCache(source, RULES, limit_bytes=2 * 160)
    for gateway in (0, 1, 0, 2, 0, 1):
        cache[gateway]
    assert source.loads == [0, 1, 2, 1]


def test_cache_holds_one_shard_whatever_its_bound() -> None:
    source = Counted()
    cache = ShardCache(source, RULES, limit_bytes=1)
    for gateway in (0, 0, 1, 1):
        cache[gateway]
    assert source.loads == [0, 1]


def test_cache_copies_so_that_the_source_cannot_be_changed_through_it() -> None:
    x = np.zeros((3, 2), np.float32)
    x.flags.writeable = False
    cache = ShardCache([(x, np.zeros(3, np.int64))], RULES)
    cache[0].x[:] = 5.0
    assert x.max() == 0


def test_cache_checks_a_shard_as_it_loads_it() -> None:
    cache = ShardCache([(np.zeros((3, 2)), [0, 1, 2])], RULES)
    with pytest.raises(InputError, match="shard of gateway 0: label 2 is out of range"):
        cache[0]


def test_cache_names_a_gateway_in_errors() -> None:
    cache = ShardCache([Gateway("clinic", data=lambda: (np.zeros((3, 2)), [0, 1]))], RULES)
    with pytest.raises(InputError, match="gateway clinic: x has 3 records and y has 2"):
        cache[0]


def test_shard_counts_records_and_bytes() -> None:
    shard = ShardCache(Counted(), RULES)[0]
    assert (shard.num_records, shard.size_bytes) == (10, 10 * 2 * 4 + 10 * 8)


def test_cut_shards_give_the_records_of_their_indices() -> None:
    x, y = np.arange(6, dtype=np.float32).reshape(6, 1), np.arange(6)
    shards = CutShards(x, y, [np.array([0, 4]), np.array([1, 2, 3, 5])])
    assert len(shards) == 2
    assert shards[0][1].tolist() == [0, 4]
    assert shards[1][0].ravel().tolist() == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (np.zeros((2, 3)), np.float32),
        (np.zeros((2, 3), np.float16), np.float32),
        (np.zeros((2, 3), np.uint8), np.int64),
        (np.zeros((2, 3), bool), np.float32),
        ([[0.0, 1.0], [2.0, 3.0]], np.float32),
        (torch.zeros(2, 3, dtype=torch.bfloat16), np.float32),
        (torch.zeros(2, 3, requires_grad=True), np.float32),
        (np.zeros((3, 2), np.float32).T, np.float32),
    ],
)
def test_as_arrays_takes_numpy_torch_and_lists(x: object, kind: type) -> None:
    found, labels = as_arrays((x, [0, 1]), "data")
    assert found.dtype == kind
    assert found.flags.c_contiguous
    assert labels.dtype == np.int64


def test_as_arrays_takes_whole_labels_of_any_type() -> None:
    for y in ([0.0, 1.0], torch.tensor([0, 1], dtype=torch.uint8), np.array([False, True])):
        assert as_arrays((np.zeros((2, 1)), y), "data")[1].tolist() == [0, 1]


def test_as_arrays_keeps_the_targets_of_a_regression() -> None:
    _, y = as_arrays((np.zeros((2, 1)), [[0.5, -1.5], [2.0, 3.0]]), "data", class_labels=False)
    assert y.dtype == np.float32
    assert y.tolist() == [[0.5, -1.5], [2.0, 3.0]]


def test_as_arrays_asks_a_gateway_for_its_records() -> None:
    x, y = as_arrays(Gateway("a", data=lambda: (np.ones((1, 2)), [3])), "data")
    assert (x.tolist(), y.tolist()) == ([[1.0, 1.0]], [3])
