"""From --dataset, or what a Python caller hands in, to checked shards and test data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedray.config.settings import RunConfig
from fedray.config.user_code import call, find_function, is_reference
from fedray.data import digits, toy
from fedray.data.gateway import Gateway
from fedray.data.inputs import Array, InputArrays
from fedray.data.partition import dirichlet_alpha, split
from fedray.data.shards import CutShards, Shards, as_arrays, is_several, load_pair
from fedray.errors import GatewayError, InputError
from fedray.privacy.streams import numpy_generator


@dataclass(frozen=True, kw_only=True)
class Federation:
    """The data of a run.

    Args:
        shards: One a gateway; checked already unless `lazy`.
        test: Public held-out `(x, y)`, or None.
        nominal_records: The public shard size that q = B / nominal uses.
        example: A few records `(x, y)` to try the model on.
        num_classes: 1 + the largest label seen so far.
        lazy: Whether shards are loaded and checked where gateways train.
        disjoint: Whether fedray itself cut the shards, so that no record is in two of them.
    """

    shards: Shards
    test: tuple[InputArrays, Array] | None
    nominal_records: int
    example: tuple[InputArrays, Array]
    num_classes: int
    lazy: bool
    disjoint: bool


def from_config(config: RunConfig, key: bytes) -> Federation:
    """Load --dataset and partition it.

    Args:
        config: Names data set, partition and gateways.
        key: The setup key, for the partition.

    Raises:
        InputError: The data breaks a rule.
    """
    alpha = dirichlet_alpha(config.data.partition)
    if config.data.dataset == "toy":
        records = config.data.samples_per_gateway or toy.DEFAULT_RECORDS
        shards, test = toy.ToyShards(config.federation.gateways, records, alpha), toy.held_out()
        return Federation(
            shards=shards,
            test=test,
            nominal_records=records,
            example=test,
            num_classes=toy.NUM_CLASSES,
            lazy=False,
            disjoint=True,
        )
    if config.data.dataset == "digits":
        if config.data.samples_per_gateway is not None:
            raise InputError(
                f"--samples-per-gateway is {config.data.samples_per_gateway} with --dataset digits; it applies to toy and to "
                "lazily loaded shards: leave it out."
            )
        train, test = digits.load()
        return _cut(config, train, test, alpha, key)
    if not is_reference(config.data.dataset):
        raise InputError(f"--dataset is {config.data.dataset!r}; it must be toy, digits or module:function.")
    name = f"--dataset {config.data.dataset}"
    result = call(
        find_function(config.data.dataset, "--dataset"), config.data.dataset, "--dataset", config.federation.gateways
    )
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise InputError(f"{name} returned {type(result).__name__}; it must return (train, test).")
    train, test = result
    if _is_pair_of_arrays(train):
        train_arrays = as_arrays(train, f"{name}: train")
        return _cut(config, train_arrays, as_arrays(test, f"{name}: test"), alpha, key)
    if config.data.partition != "iid":
        raise InputError(
            f"--partition is {config.data.partition!r} but {name} returns shards that are already cut; leave it out."
        )
    return from_shards(config, train, as_arrays(test, f"{name}: test"), f"{name}: train")


def from_shards(
    config: RunConfig, shards: Any, test: tuple[InputArrays, Array] | None, where: str, class_labels: bool = True
) -> Federation:
    """Take shards that the user cut: a list is checked now, any other sequence where its items are needed.

    Raises:
        InputError: Wrong number or kind of shards, a bad record, or lazy shards without --samples-per-gateway.
    """
    if not hasattr(shards, "__len__") or not hasattr(shards, "__getitem__"):
        raise InputError(f"{where} is {type(shards).__name__}; it must be (x, y) or a sequence of such pairs.")
    if len(shards) != config.federation.gateways:
        raise InputError(
            f"{where} has {len(shards)} shards for --gateways {config.federation.gateways}; they must be equally many (one "
            "data set that fedray is to partition must be a pair of numpy arrays or torch tensors)."
        )
    deferred = isinstance(shards, list | tuple) and any(isinstance(s, Gateway) and callable(s.data) for s in shards)
    lazy = deferred or not isinstance(shards, list | tuple)
    if lazy and config.data.samples_per_gateway is None:
        raise InputError(
            f"{where} is loaded lazily, so its size is not known; give the public nominal shard size with "
            "--samples-per-gateway."
        )
    if lazy:
        example = test if test is not None else _first(shards, f"{where}, shard 0", class_labels)
        return Federation(
            shards=shards,
            test=test,
            nominal_records=int(config.data.samples_per_gateway or 0),
            example=example,
            num_classes=_num_classes([example[1]], class_labels),
            lazy=True,
            disjoint=False,
        )
    pairs = [as_arrays(pair, _name(pair, where, i), class_labels) for i, pair in enumerate(shards)]
    total = sum(len(y) for _, y in pairs)
    labels = [y for _, y in pairs] + ([] if test is None else [test[1]])
    return Federation(
        shards=pairs,
        test=test,
        nominal_records=config.data.samples_per_gateway or total // len(pairs),
        example=test if test is not None else pairs[0],
        num_classes=_num_classes(labels, class_labels),
        lazy=False,
        disjoint=False,
    )


def _first(shards: Shards, where: str, class_labels: bool) -> tuple[InputArrays, Array]:
    """Return the first of lazy shards, to try the model on."""
    try:
        pair, _ = load_pair(shards, 0)
    except GatewayError as error:
        raise InputError(error.message) from error
    return as_arrays(pair, where, class_labels)


def _cut(
    config: RunConfig,
    train: tuple[InputArrays, Array],
    test: tuple[InputArrays, Array],
    alpha: float | None,
    key: bytes,
) -> Federation:
    if config.data.samples_per_gateway is not None:
        raise InputError(
            f"--samples-per-gateway is {config.data.samples_per_gateway} but fedray cuts the shards of this data set; "
            "leave it out: the nominal size is training records / gateways."
        )
    x, y = train
    indices = split(y, config.federation.gateways, alpha, numpy_generator(key, "partition"))
    taken = np.concatenate(indices)
    assert len(taken) == len(y) == len(np.unique(taken)), "shards must be disjoint and cover the data"
    return Federation(
        shards=CutShards(x, y, indices),
        test=test,
        nominal_records=len(y) // config.federation.gateways,
        example=test,
        num_classes=_num_classes([y, test[1]], True),
        lazy=False,
        disjoint=True,
    )


def _is_pair_of_arrays(train: Any) -> bool:
    """Tell (x, y) from two shards: y is an array, and a shard is none."""
    return (
        isinstance(train, tuple | list)
        and len(train) == 2
        and (_has_shape(train[0]) or is_several(train[0]))
        and _has_shape(train[1])
    )


def _has_shape(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _num_classes(labels: Sequence[Array], class_labels: bool) -> int:
    return max(int(y.max()) for y in labels) + 1 if class_labels else 0


def _name(pair: Any, where: str, index: int) -> str:
    return f"gateway {pair.name}" if isinstance(pair, Gateway) else f"{where}, shard {index}"
