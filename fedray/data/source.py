"""The seam of data: from --dataset, or what a Python caller hands in, to checked shards and test data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fedray.config.seams import check_is, find, is_named, reference_in
from fedray.config.settings import RunConfig
from fedray.config.user_code import call, find_function
from fedray.data.gateway import Gateway
from fedray.data.inputs import Array, InputArrays
from fedray.data.partition import Partitioner, split
from fedray.data.shards import CutShards, Shards, as_arrays, is_several, load_pair
from fedray.errors import FedrayError, GatewayError, InputError
from fedray.privacy.streams import numpy_generator
from fedray.tasks.task import Task

Pair = tuple[InputArrays, Array]


@dataclass(frozen=True, kw_only=True)
class Federation:
    """The data of a run.

    Args:
        shards: One a gateway; checked already unless `lazy`.
        test: Public held-out `(x, y)`, or None.
        nominal_records: The public shard size that q = B / nominal uses.
        example: A few records `(x, y)` to try the model on.
        num_outputs: That a reference model needs, see `Task.num_outputs`.
        lazy: Whether shards are loaded and checked where gateways train.
        disjoint: Whether fedray itself cut the shards, so that no record is in two of them.
        generated: Whether shards are made from a fixed public key, the same in every run: nothing to check or compare.
    """

    shards: Shards
    test: Pair | None
    nominal_records: int
    example: Pair
    num_outputs: int
    lazy: bool
    disjoint: bool
    generated: bool = False


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run wants of a source, and how arrays become a federation.

    Args:
        gateways: How many shards.
        samples_per_gateway: Public nominal shard size, or None.
        partition: The value of --partition.
        partitioner: What it names.
        task: Checks targets.
        key: The setup key, for draws.
    """

    gateways: int
    samples_per_gateway: int | None
    partition: str
    partitioner: Partitioner
    task: Task
    key: bytes

    def cut(self, train: Any, test: Any, where: str = "--dataset") -> Federation:
        """Return one data set, split over gateways as --partition says.

        Args:
            train: `(x, y)` of arrays or tensors.
            test: The same, public; or None.
            where: Names the data in errors.

        Raises:
            InputError: A record breaks a rule, or --samples-per-gateway was given.
        """
        if self.samples_per_gateway is not None:
            raise InputError(
                f"--samples-per-gateway is {self.samples_per_gateway} but fedray cuts the shards of this data set; "
                "leave it out: the nominal size is training records / gateways."
            )
        x, y = as_arrays(train, f"{where}: train", self.task)
        held_out = None if test is None else as_arrays(test, f"{where}: test", self.task)
        rng = numpy_generator(self.key, "partition")
        indices = split(self.partitioner, self.partition, y, self.gateways, rng)
        shards = CutShards(x, y, indices)
        return Federation(
            shards=shards,
            test=held_out,
            nominal_records=len(y) // self.gateways,
            example=shards[0] if held_out is None else held_out,
            num_outputs=self.task.num_outputs([y] if held_out is None else [y, held_out[1]]),
            lazy=False,
            disjoint=True,
        )

    def take(self, shards: Any, test: Any, where: str = "--dataset: train") -> Federation:
        """Return shards that are cut already: a list is checked now, any other sequence where its items are needed.

        Args:
            shards: `(x, y)` pairs or `Gateway`s, one a gateway.
            test: `(x, y)`, public; or None.
            where: Names the shards in errors.

        Raises:
            InputError: Wrong number or kind of shards, a bad record, lazy shards without --samples-per-gateway, or a
                --partition.
        """
        name = where.partition(":")[0]
        if self.partition != "iid":
            raise InputError(
                f"--partition is {self.partition!r} but the shards of {name} are already cut; leave it out."
            )
        held_out = None if test is None else as_arrays(test, f"{name}: test" if name != where else "test", self.task)
        if not hasattr(shards, "__len__") or not hasattr(shards, "__getitem__"):
            raise InputError(f"{where} is {type(shards).__name__}; it must be (x, y) or a sequence of such pairs.")
        if len(shards) != self.gateways:
            raise InputError(
                f"{where} has {len(shards)} shards for --gateways {self.gateways}; they must be equally many (one data set "
                "that fedray is to partition must be a pair of numpy arrays or torch tensors)."
            )
        deferred = isinstance(shards, list | tuple) and any(isinstance(s, Gateway) and callable(s.data) for s in shards)
        if deferred or not isinstance(shards, list | tuple):
            return self._lazily(shards, held_out, where)
        pairs = [as_arrays(pair, _name(pair, where, i), self.task) for i, pair in enumerate(shards)]
        targets = [y for _, y in pairs]
        return Federation(
            shards=pairs,
            test=held_out,
            nominal_records=self.samples_per_gateway or sum(map(len, targets)) // len(pairs),
            example=pairs[0] if held_out is None else held_out,
            num_outputs=self.task.num_outputs(targets if held_out is None else [*targets, held_out[1]]),
            lazy=False,
            disjoint=False,
        )

    def _lazily(self, shards: Shards, test: Pair | None, where: str) -> Federation:
        if self.samples_per_gateway is None:
            raise InputError(
                f"{where} is loaded lazily, so its size is not known; give the public nominal shard size with "
                "--samples-per-gateway."
            )
        example = test if test is not None else self._first(shards, f"{where}, shard 0")
        return Federation(
            shards=shards,
            test=test,
            nominal_records=self.samples_per_gateway,
            example=example,
            num_outputs=self.task.num_outputs([example[1]]),
            lazy=True,
            disjoint=False,
        )

    def _first(self, shards: Shards, where: str) -> Pair:
        """Return the first of lazy shards, to try the model on."""
        try:
            pair, _ = load_pair(shards, 0)
        except GatewayError as error:
            raise InputError(error.message) from error
        return as_arrays(pair, where, self.task)


@runtime_checkable
class Source(Protocol):
    """Where records come from."""

    def load(self, wanted: Wanted) -> Federation:
        """Return the data of a run, by `wanted.cut` or `wanted.take` unless the source knows better.

        Raises:
            InputError: It cannot.
        """
        ...


class FunctionSource:
    """A user's function of the number of gateways, which returns (train, test); train is one data set or a list of shards.

    Args:
        function: The function.
        name: The value of --dataset.
    """

    def __init__(self, function: Callable[[int], Any], name: str) -> None:
        self._function, self._name = function, name

    def load(self, wanted: Wanted) -> Federation:
        """See `Source.load`."""
        where = f"--dataset {self._name}"
        result = call(self._function, self._name, "--dataset", wanted.gateways)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise InputError(f"{where} returned {type(result).__name__}; it must return (train, test).")
        train, test = result
        return (
            wanted.cut(train, test, where) if _is_pair_of_arrays(train) else wanted.take(train, test, f"{where}: train")
        )


def wanted_of(config: RunConfig, task: Task, key: bytes) -> Wanted:
    """Return what a run with these settings wants of its data.

    Args:
        config: The settings.
        task: What is learned.
        key: The setup key.

    Raises:
        InputError: --partition names nothing.
    """
    partitioner = find("partitioner", config.data.partition)
    check_is(partitioner, Partitioner, "partitioner", config.data.partition)
    return Wanted(
        gateways=config.federation.gateways,
        samples_per_gateway=config.data.samples_per_gateway,
        partition=config.data.partition,
        partitioner=partitioner,
        task=task,
        key=key,
    )


def load(dataset: str, wanted: Wanted) -> Federation:
    """Return the data that --dataset names.

    Raises:
        InputError: It names nothing, or the data breaks a rule.
    """
    users = None if is_named("source", dataset) else reference_in(dataset)
    function = None if users is None else find_function(users, "--dataset")
    plain = None if isinstance(function, type) else function
    source = find("source", dataset) if plain is None else FunctionSource(plain, dataset)
    check_is(source, Source, "source", dataset)
    try:
        found = source.load(wanted)
    except FedrayError:
        raise
    except (Exception, SystemExit) as error:  # a user's source may raise anything
        raise InputError(
            f"--dataset {dataset} raised {type(error).__name__}: {error}; it must load without error."
        ) from error
    if not isinstance(found, Federation):
        raise InputError(
            f"--dataset {dataset} loaded {type(found).__name__}; it must return wanted.cut(train, test), or wanted.take of "
            "shards that are cut."
        )
    return found


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


def _name(pair: Any, where: str, index: int) -> str:
    return f"gateway {pair.name}" if isinstance(pair, Gateway) else f"{where}, shard {index}"
