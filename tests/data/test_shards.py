"""Checking records, and the bounded cache of shards."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch

from fedray.data.gateway import Gateway
from fedray.data.shards import CutShards, RecordRules, Shard, ShardCache, as_arrays, joined
from fedray.errors import InputError
from fedray.tasks.classification import cross_entropy
from fedray.tasks.own_loss import OwnLoss

RULES = RecordRules.of(np.zeros((1, 2), np.float32), outputs=(2,))


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
    _, y = as_arrays((np.zeros((2, 1)), [[0.5, -1.5], [2.0, 3.0]]), "data", OwnLoss(cross_entropy))
    assert y.dtype == np.float32
    assert y.tolist() == [[0.5, -1.5], [2.0, 3.0]]


def test_as_arrays_asks_a_gateway_for_its_records() -> None:
    x, y = as_arrays(Gateway("a", data=lambda: (np.ones((1, 2)), [3])), "data")
    assert (x.tolist(), y.tolist()) == ([[1.0, 1.0]], [3])


IDS, MASK, LABELS = np.arange(6, dtype=np.int32).reshape(3, 2), np.array([[True, False]] * 3), [0, 1, 0]


def test_as_arrays_takes_a_tuple_of_arrays_as_several_inputs() -> None:
    x, _ = as_arrays(((IDS, torch.zeros(3, 4), MASK, [1.0, 2.0, 3.0]), LABELS), "data")
    assert isinstance(x, tuple)
    assert [(part.dtype, part.shape) for part in x] == [
        (np.int64, (3, 2)),
        (np.float32, (3, 4)),
        (np.bool_, (3, 2)),
        (np.float32, (3,)),
    ]


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_as_arrays_takes_a_mapping_and_sorts_its_keys(kind: Any) -> None:
    x, _ = as_arrays((kind({"mask": MASK, "ids": IDS}), LABELS), "data")
    assert type(x) is dict
    assert list(x) == ["ids", "mask"]
    assert (x["ids"].dtype, x["mask"].dtype) == (np.int64, np.bool_)
    assert all(part.flags.c_contiguous for part in x.values())


@pytest.mark.parametrize("x", [[[0.0, 1.0], [2.0, 3.0]], ((0.0, 1.0), (2.0, 3.0)), [np.zeros(2), np.ones(2)]])
def test_as_arrays_takes_lists_and_tuples_of_numbers_as_rows(x: Any) -> None:
    found, _ = as_arrays((x, [0, 1]), "data")
    assert isinstance(found, np.ndarray)
    assert found.shape == (2, 2)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        ((IDS, MASK[:2]), r"data: x\[1\] has 2 records and y has 3; .*one array each: stack rows"),
        ({"ids": IDS, "mask": MASK[:0]}, "data is empty"),
        ({"ids": IDS, "mask": np.full((3, 2), np.nan)}, r"data: x\['mask'\] of record 0 is NaN or infinite"),
        ({"ids": IDS, "text": np.array(["a", "b", "c"])}, r"data: x\['text'\] has type <U1; it must be real numbers"),
        ({"ids": IDS, "inner": {"mask": MASK}}, r"data: x\['inner'\] has type object"),
        ((IDS, [[1], [1, 2], [3]]), r"data: x\[1\] is ragged or no array"),
        ((IDS, np.float32(1.0)), "data holds single numbers"),
        ((IDS, np.zeros((3, 0))), r"data: x\[1\] has shape \(3, 0\); a record must hold"),
        ({}, "data: x is an empty mapping; it must map names of the model's arguments to arrays"),
        ({0: IDS}, "data: x has the key 0; it must map names of the model's arguments to arrays"),
    ],
)
def test_as_arrays_names_the_input_that_is_wrong(x: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        as_arrays((x, LABELS), "data")


def test_as_arrays_says_that_x_may_be_several_when_it_gets_no_pair() -> None:
    with pytest.raises(InputError, match=r"data is tuple; it must be a pair \(x, y\).*x may be a tuple or dict"):
        as_arrays((IDS, MASK, LABELS), "data")


GOOD = {"ids": IDS.astype(np.int64), "mask": MASK}


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (IDS, r"shard 1: x is one array, elsewhere it is a dict of arrays 'ids', 'mask'; all shards .* must agree"),
        ((IDS, MASK), "x is a tuple of 2 arrays, elsewhere it is a dict"),
        ({"ids": IDS}, "x is a dict of arrays 'ids', elsewhere it is a dict of arrays 'ids', 'mask'"),
        ({"ids": IDS, "masks": MASK}, "x is a dict of arrays 'ids', 'masks', elsewhere"),
        ({"ids": IDS[:, :1], "mask": MASK}, r"x\['ids'\] has records of shape \(1,\), elsewhere it is \(2,\)"),
        ({"ids": IDS, "mask": MASK + 0}, r"x\['mask'\] is int64, elsewhere it is bool; .* one kind of x\['mask'\]"),
    ],
)
def test_rules_name_the_input_that_differs(x: Any, sentence: str) -> None:
    rules = RecordRules.of(as_arrays((GOOD, LABELS), "shard 0")[0], outputs=(2,))
    rules.check(*as_arrays((GOOD, LABELS), "shard 0"), "shard 0")
    with pytest.raises(InputError, match=sentence):
        rules.check(*as_arrays((x, LABELS), "shard 1"), "shard 1")


def test_cache_holds_several_inputs_as_copies() -> None:
    cache = ShardCache([(GOOD, LABELS)], RecordRules.of(GOOD, outputs=(2,)))
    shard = cache[0]
    assert isinstance(shard.x, dict)
    assert {name: leaf.dtype for name, leaf in shard.x.items()} == {"ids": torch.int64, "mask": torch.bool}
    assert (shard.num_records, shard.size_bytes) == (3, 3 * 2 * 8 + 3 * 2 + 3 * 8)
    shard.x["ids"].zero_()
    assert GOOD["ids"].any()


def test_cut_shards_cut_every_input() -> None:
    x, y = CutShards(GOOD, np.array(LABELS), [np.array([0, 2]), np.array([1])])[0]
    assert isinstance(x, dict)
    assert (x["ids"].tolist(), x["mask"].tolist(), y.tolist()) == ([[0, 1], [4, 5]], [[True, False]] * 2, [0, 0])


def test_shard_records_and_joined_keep_inputs_and_labels_together() -> None:
    shard = Shard(x=(torch.arange(4), torch.arange(4) * 10), y=torch.arange(4) * 100)
    parts = [shard.records(torch.tensor([3, 1])), shard.records(slice(1)), shard.records(torch.arange(4) == 2)]
    found = joined(parts)
    assert isinstance(found.x, tuple)
    assert [leaf.tolist() for leaf in (*found.x, found.y)] == [[3, 1, 0, 2], [30, 10, 0, 20], [300, 100, 0, 200]]
