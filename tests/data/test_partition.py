"""Partitions: disjoint, covering, never empty; even when iid, skewed when Dirichlet."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.config.seams import find
from fedray.data.partition import Dirichlet, Iid, Indices, Partitioner
from fedray.data.partition import split as split_by
from fedray.errors import InputError


def split(labels: npt.NDArray[np.int64], gateways: int, alpha: float | None, rng: np.random.Generator) -> Indices:
    partitioner: Partitioner = Iid() if alpha is None else Dirichlet(str(alpha))
    return split_by(partitioner, "the rule", labels, gateways, rng)


labels_and_gateways = st.integers(1, 200).flatmap(
    lambda records: st.tuples(
        st.lists(st.integers(0, 5), min_size=records, max_size=records), st.integers(1, records), st.integers(0, 2**32)
    )
)


@settings(max_examples=200, deadline=None)
@given(labels_and_gateways, st.one_of(st.none(), st.sampled_from([1e-3, 0.1, 0.5, 1.0, 100.0, 1e6])))
def test_split_covers_all_records_once_and_leaves_no_shard_empty(
    drawn: tuple[list[int], int, int], alpha: float | None
) -> None:
    labels, gateways, seed = drawn
    shards = split(np.asarray(labels), gateways, alpha, np.random.default_rng(seed))
    assert len(shards) == gateways
    assert all(len(shard) > 0 for shard in shards)
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(labels)))
    assert all((np.diff(shard) > 0).all() for shard in shards)


@settings(max_examples=50, deadline=None)
@given(labels_and_gateways)
def test_split_iid_gives_sizes_that_differ_by_one_at_most(drawn: tuple[list[int], int, int]) -> None:
    labels, gateways, seed = drawn
    sizes = [len(shard) for shard in split(np.asarray(labels), gateways, None, np.random.default_rng(seed))]
    assert max(sizes) - min(sizes) <= 1


def test_split_iid_mixes_labels() -> None:
    labels = np.arange(4000) % 4  # dealing them out in order would give each gateway one label
    for shard in split(labels, 4, None, np.random.default_rng(0)):
        counts = np.bincount(labels[shard], minlength=4)
        assert (np.abs(counts - 250) < 60).all()  # four standard deviations of a hypergeometric count are 55


def _skew(alpha: float) -> float:
    """Return the mean share of the commonest label of a shard."""
    labels = np.repeat(np.arange(10), 500)
    shards = split(labels, 20, alpha, np.random.default_rng(1))
    return float(np.mean([np.bincount(labels[shard]).max() / len(shard) for shard in shards]))


def test_split_dirichlet_skews_labels_more_as_alpha_falls() -> None:
    nearly_one_label, strong, nearly_even = _skew(0.01), _skew(0.5), _skew(1000.0)
    assert nearly_one_label > 0.8
    assert 0.2 < strong < 0.6
    assert nearly_even < 0.15


def test_split_follows_its_generator() -> None:
    labels = np.arange(100) % 3
    one, same, other = (split(labels, 5, 0.5, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_split_refuses_more_gateways_than_records() -> None:
    with pytest.raises(InputError, match="--gateways is 4 but the data has 3 training records"):
        split(np.zeros(3, np.int64), 4, None, np.random.default_rng(0))


def test_find_reads_the_flag() -> None:
    assert isinstance(find("partitioner", "iid"), Iid)
    assert find("partitioner", "dirichlet:0.5").alpha == 0.5


@pytest.mark.parametrize("partition", ["dirichlet:nan", "dirichlet:-1", "dirichlet:inf", "dirichlet:", "dirichlet"])
def test_find_refuses_a_concentration(partition: str) -> None:
    with pytest.raises(InputError, match="it must be iid or dirichlet:ALPHA with ALPHA > 0"):
        find("partitioner", partition)


@pytest.mark.parametrize("partition", ["IID", "", "dirichlet 1", ":", "no module:name"])
def test_find_refuses_what_is_no_partition(partition: str) -> None:
    with pytest.raises(InputError, match="it must be iid, dirichlet:ALPHA or module:name"):
        find("partitioner", partition)


class _Wrong:
    def __init__(self, *shards: list[int]) -> None:
        self._shards = shards

    def split(self, targets: npt.NDArray[np.int64], gateways: int, rng: np.random.Generator) -> Indices:
        if not self._shards:
            raise ZeroDivisionError("no shards")
        return [np.array(shard, np.int64) for shard in self._shards]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (_Wrong([0, 1], [1, 2]), "returned a record twice, or one that does not exist"),
        (_Wrong([0, 1], [7]), "returned a record twice, or one that does not exist"),
        (_Wrong([0, -1], [1]), "returned a record twice, or one that does not exist"),
        (_Wrong([0, 1], []), "returned 2 index arrays, 1 of them empty"),
        (_Wrong([0, 1]), "returned 1 index arrays"),
        (_Wrong(), "raised ZeroDivisionError: no shards"),
    ],
)
def test_split_refuses_what_would_break_a_claim(wrong: _Wrong, sentence: str) -> None:
    """A record in two shards would be charged once and used twice."""
    with pytest.raises(InputError, match=sentence):
        split_by(wrong, "the rule", np.zeros(3, np.int64), 2, np.random.default_rng(0))


def test_split_may_leave_records_out() -> None:
    assert [
        list(own) for own in split_by(_Wrong([2], [0]), "the rule", np.zeros(3, np.int64), 2, np.random.default_rng(0))
    ] == [
        [2],
        [0],
    ]
