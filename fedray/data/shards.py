"""Shards: what each gateway holds, as arrays that are checked once and cut, made or loaded where they are needed."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedray.data import inputs
from fedray.data.gateway import Gateway
from fedray.data.inputs import Array, InputArrays, Inputs, leaf_names, leaves, rebuilt
from fedray.errors import GatewayError, InputError
from fedray.tasks.classification import Classification
from fedray.tasks.task import Task, finite

CLASSES = Classification()


class Shards(Protocol):
    """Anything with a length and an index; item i is gateway i's `(x, y)` pair or `Gateway`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Shard:
    """A gateway's records, checked.

    Args:
        x: Each tensor `[N, …]` float32, int64 or, among several, bool.
        y: `[N, …]`, int64 or float32: class indices, or what else the task takes.
    """

    x: Inputs
    y: torch.Tensor

    @property
    def num_records(self) -> int:
        """N, private."""
        return len(self.y)

    @property
    def size_bytes(self) -> int:
        """Memory that the records take."""
        return sum(part.numel() * part.element_size() for part in (*leaves(self.x), self.y))

    def records(self, index: slice | torch.Tensor) -> Shard:
        """Return the records that a slice, indices `[n]` or a mask `[N]` name."""
        return Shard(x=inputs.taken(self.x, index), y=self.y[index])


def joined(shards: Sequence[Shard]) -> Shard:
    """Return the records of several shards, one after the other."""
    return Shard(x=inputs.joined([shard.x for shard in shards]), y=torch.cat([shard.y for shard in shards]))


@dataclass(frozen=True)
class LeafRule:
    """What one tensor of a record looks like.

    Args:
        shape: Without the records' dimension.
        kind: Name of its type: float32 (measurements), int64 (indices, tokens) or bool (masks).
    """

    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True, kw_only=True)
class RecordRules:
    """What every shard must look like.

    Args:
        record: A `LeafRule` for each tensor of x, in x's structure.
        task: Checks targets.
        outputs: Shape of the model's output for a record, which targets must fit; None where nothing is known of it.
    """

    record: LeafRule | tuple[LeafRule, ...] | dict[str, LeafRule]
    task: Task
    outputs: tuple[int, ...] | None

    @classmethod
    def of(cls, x: InputArrays, task: Task = CLASSES, outputs: tuple[int, ...] | None = None) -> RecordRules:
        """Return the rules that records like these keep."""
        rules = [LeafRule(shape=tuple(leaf.shape[1:]), kind=leaf.dtype.name) for leaf in leaves(x)]
        return cls(record=rebuilt(x, rules), task=task, outputs=outputs)

    def check(self, x: InputArrays, y: Array, where: str) -> None:
        """Raise InputError when a checked pair does not fit its siblings."""
        if not inputs.same_structure(x, self.record):
            raise InputError(
                f"{where}: x is {inputs.structure_name(x)}, elsewhere it is {inputs.structure_name(self.record)}; all "
                "shards and the test data must agree."
            )
        for name, leaf, rule in zip(leaf_names(x), leaves(x), leaves(self.record), strict=True):
            if leaf.shape[1:] != rule.shape:
                raise InputError(
                    f"{where}: {name} has records of shape {leaf.shape[1:]}, elsewhere it is {rule.shape}; "
                    "all shards and the test data must agree."
                )
            if leaf.dtype.name != rule.kind:
                raise InputError(
                    f"{where}: {name} is {leaf.dtype}, elsewhere it is {rule.kind}; all shards and the "
                    f"test data must hold one kind of {name}."
                )
        if self.outputs is not None:
            self.task.check_fit(y, self.outputs, where)


def as_arrays(pair: Any, where: str, task: Task = CLASSES) -> tuple[InputArrays, Array]:
    """Return `(x, y)` as contiguous numpy arrays (x float32 or int64; y as the task wants its targets).

    x is one array, or several: a tuple that holds arrays or tensors, or a mapping with text keys (its keys are sorted, so
    that their order means nothing). Only among several may an array stay bool, as a mask. A list is rows of numbers.

    Args:
        pair: A pair of arrays, tensors or sequences, x maybe a tuple or mapping of such; or a `Gateway`.
        where: Names the pair in errors.
        task: Checks the targets.

    Raises:
        InputError: Not a pair, empty, lengths differ, not numeric, not finite, or a target breaks a rule of the task.
    """
    if isinstance(pair, Gateway):
        pair = pair.load()
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InputError(
            f"{where} is {type(pair).__name__}; it must be a pair (x, y) of arrays; x may be a tuple or dict of arrays."
        )
    x, y = _parts(pair[0], f"{where}: x"), _numeric(pair[1], f"{where}: y")
    names = leaf_names(x)
    for name, leaf in zip(names, leaves(x), strict=True):
        if leaf.ndim == 0 or y.ndim == 0:
            raise InputError(f"{where} holds single numbers; x and y must be arrays with one entry a record.")
        if len(leaf) == 0:
            raise InputError(f"{where} is empty; each gateway and the test data must hold at least one record.")
        if len(leaf) != len(y):
            remedy = "" if name == "x" else " (several inputs are one array each: stack rows into one)"
            raise InputError(
                f"{where}: {name} has {len(leaf)} records and y has {len(y)}; they must be equally many{remedy}."
            )
        if leaf.size == 0:
            raise InputError(f"{where}: {name} has shape {leaf.shape}; a record must hold at least one value.")
    x = _typed(x, [f"{where}: {name}" for name in names])
    return x, task.check_targets(y, f"{where}: y")


def is_array(value: object) -> bool:
    """Tell whether a value is an array or tensor with records, rather than a number or a sequence of numbers."""
    return hasattr(value, "dtype") and getattr(value, "ndim", 0) > 0


def is_several(x: object) -> bool:
    """Tell whether x is several inputs, a tuple that holds arrays or a mapping, rather than one array."""
    return isinstance(x, Mapping) or (isinstance(x, tuple) and any(is_array(part) for part in x))


def _parts(x: Any, where: str) -> InputArrays:
    """Return x as arrays in the structure that it has."""
    if not is_several(x):
        return _numeric(x, where)
    if isinstance(x, Mapping):
        strange = [key for key in x if not isinstance(key, str)]
        if strange or not x:
            found = f"has the key {strange[0]!r}" if strange else "is an empty mapping"
            raise InputError(f"{where} {found}; it must map names of the model's arguments to arrays.")
        x = {key: x[key] for key in sorted(x)}
    parts = [_numeric(leaf, name) for leaf, name in zip(leaves(x), leaf_names(x, where), strict=True)]
    return rebuilt(x, parts)  # type: ignore[no-any-return]  # as x


def _typed(x: InputArrays, where: Sequence[str]) -> InputArrays:
    """Return x with arrays of the types that models are given; `where` names them."""
    keeps_masks = is_several(x)
    found = [
        np.ascontiguousarray(leaf) if keeps_masks and leaf.dtype == np.bool_ else finite(leaf, name)
        for name, leaf in zip(where, leaves(x), strict=True)
    ]
    return rebuilt(x, found)  # type: ignore[no-any-return]  # as x


def _numeric(values: Any, where: str) -> Array:
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged rows, or a tensor that is sparse or quantized
        raise InputError(f"{where} is ragged or no array ({error}); it must be one array with equal rows.") from error
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_) or np.iscomplexobj(array):
        raise InputError(f"{where} has type {array.dtype}; it must be real numbers.")
    return array


@dataclass(frozen=True)
class CutShards:
    """Shards cut from one data set by index; the arrays are shared, a shard is copied when it is asked for.

    Args:
        x: Each array `[N, …]`, checked.
        y: `[N]`, checked.
        indices: One sorted index array a gateway, disjoint.
    """

    x: InputArrays
    y: Array
    indices: Sequence[npt.NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[InputArrays, Array]:
        chosen = self.indices[index]
        return inputs.taken(self.x, chosen), self.y[chosen]


def load_pair(shards: Shards, gateway: int) -> tuple[Any, str]:
    """Return what the user's code gives as a gateway's shard, unchecked, and what errors call it.

    Raises:
        GatewayError: It raised.
    """
    where = f"shard of gateway {gateway}"
    try:
        item = shards[gateway]
        if isinstance(item, Gateway):
            where = f"gateway {item.name}"
            item = item.load()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise GatewayError(
            f"{where} cannot be loaded ({type(error).__name__}: {error}); it must load wherever its gateway trains: see to "
            "its files.",
            traceback.format_exc(),
        ) from error
    return item, where


class ShardCache:
    """Loads, checks and keeps the shards that an actor works on, up to a bound (least recently used go first).

    Args:
        shards: The source.
        rules: What each shard must look like.
        limit_bytes: Bound of what is kept.
    """

    def __init__(self, shards: Shards, rules: RecordRules, limit_bytes: int = 512 * 2**20) -> None:
        self._shards = shards
        self._rules = rules
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._kept: OrderedDict[int, Shard] = OrderedDict()

    def __getitem__(self, gateway: int) -> Shard:
        """Return a gateway's shard.

        Raises:
            InputError: A lazily loaded shard breaks a rule.
            GatewayError: The user's code could not load it.
        """
        if gateway in self._kept:
            self._kept.move_to_end(gateway)
            return self._kept[gateway]
        pair, where = load_pair(self._shards, gateway)
        x, y = as_arrays(pair, where, self._rules.task)
        self._rules.check(x, y, where)
        shard = Shard(x=inputs.tensors(x), y=torch.from_numpy(y.copy()))  # copies: arrays may be shared, or read-only
        self._kept[gateway] = shard
        self._size_bytes += shard.size_bytes
        while self._size_bytes > self._limit_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._size_bytes -= dropped.size_bytes
        return shard
