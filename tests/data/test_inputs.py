"""The structure of x: what is done leaf by leaf, for one tensor, a tuple and a dict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedray.data import inputs

ONE = torch.arange(6).view(3, 2)
TWO = torch.tensor([True, False, True])
EACH: list[Any] = [ONE, (ONE, TWO), {"ids": ONE, "mask": TWO}]


@pytest.mark.parametrize("x", EACH)
def test_rebuilt_puts_leaves_where_they_were(x: Any) -> None:
    again = inputs.rebuilt(x, inputs.leaves(x))
    assert type(again) is type(x)
    assert [id(leaf) for leaf in inputs.leaves(again)] == [id(leaf) for leaf in inputs.leaves(x)]
    assert inputs.leaf_names(again) == inputs.leaf_names(x)


def test_leaf_names_say_where_a_leaf_lies() -> None:
    assert [inputs.leaf_names(x) for x in EACH] == [["x"], ["x[0]", "x[1]"], ["x['ids']", "x['mask']"]]


@pytest.mark.parametrize("x", EACH)
def test_taken_gives_the_same_records_of_every_leaf(x: Any) -> None:
    found = inputs.leaves(inputs.taken(x, torch.tensor([2, 0])))
    assert [leaf.tolist() for leaf in found] == [[[4, 5], [0, 1]], [True, True]][: len(found)]


@pytest.mark.parametrize("x", EACH)
def test_joined_keeps_structure_and_order(x: Any) -> None:
    parts = [inputs.taken(x, slice(1)), inputs.taken(x, slice(1, 3))]
    again = inputs.joined(parts)
    assert inputs.same_structure(again, x)
    assert all(torch.equal(*pair) for pair in zip(inputs.leaves(again), inputs.leaves(x), strict=True))


@pytest.mark.parametrize("x", EACH)
def test_tensors_are_copies_of_arrays(x: Any) -> None:
    held = inputs.rebuilt(x, [leaf.numpy().copy() for leaf in inputs.leaves(x)])
    for leaf in inputs.leaves(held):
        leaf.flags.writeable = False  # as Ray hands arrays over
    copies = inputs.tensors(held)
    for leaf in inputs.leaves(copies):
        leaf.zero_()
    assert all(array.any() for array in inputs.leaves(held))


@pytest.mark.parametrize("x", EACH)
def test_arrays_keep_types_and_values(x: Any) -> None:
    found = inputs.arrays(x)
    assert inputs.same_structure(found, x)
    for array, leaf in zip(inputs.leaves(found), inputs.leaves(x), strict=True):
        assert isinstance(array, np.ndarray)
        assert array.tolist() == leaf.tolist()


def test_only_leaf_takes_one_argument_whatever_its_name() -> None:
    for x in (ONE, (ONE,), {"input": ONE}):
        assert inputs.only_leaf(x) is ONE
    with pytest.raises(ValueError, match="too many values"):
        inputs.only_leaf((ONE, TWO))


def test_same_structure_tells_names_and_numbers_apart() -> None:
    different = [ONE, (ONE,), (ONE, TWO), {"ids": ONE}, {"mask": ONE}, {"ids": ONE, "mask": TWO}]
    for i, x in enumerate(different):
        assert [inputs.same_structure(x, other) for other in different] == [i == j for j in range(len(different))]
