"""Shards: what each gateway holds, as arrays that are checked once and cut, made or loaded where they are needed."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedray.errors import GatewayError, InputError
from fedray.gateway import Gateway

Array = npt.NDArray[Any]


class Shards(Protocol):
    """Anything with a length and an index; item i is gateway i's `(x, y)` pair or `Gateway`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Shard:
    """A gateway's records, checked.

    Args:
        x: `[N, …]` float32 or int64.
        y: `[N]` or `[N, …]`; int64 class indices unless the user brought a loss.
    """

    x: torch.Tensor
    y: torch.Tensor

    @property
    def num_records(self) -> int:
        """N, private."""
        return len(self.y)

    @property
    def size_bytes(self) -> int:
        """Memory that the records take."""
        return self.x.numel() * self.x.element_size() + self.y.numel() * self.y.element_size()


@dataclass(frozen=True, kw_only=True)
class RecordRules:
    """What every shard must look like.

    Args:
        record_shape: Shape of one x.
        integer: Whether x holds indices (tokens) rather than measurements.
        num_classes: Labels are 0 … num_classes − 1; None when the user brought a loss of its own.
    """

    record_shape: tuple[int, ...]
    integer: bool
    num_classes: int | None

    def check(self, x: Array, y: Array, where: str) -> None:
        """Raise InputError when a checked pair does not fit its siblings."""
        if x.shape[1:] != self.record_shape:
            raise InputError(
                f"{where}: x has records of shape {x.shape[1:]}, elsewhere it is {self.record_shape}; "
                "all shards and the test data must agree."
            )
        if np.issubdtype(x.dtype, np.integer) != self.integer:
            raise InputError(
                f"{where}: x is {x.dtype}, elsewhere it is {'int64' if self.integer else 'float32'}; all shards and the "
                "test data must hold one kind of x."
            )
        if self.num_classes is not None and int(y.max()) >= self.num_classes:
            raise InputError(
                f"{where}: label {int(y.max())} is out of range; the model has {self.num_classes} outputs, so labels "
                f"must be 0 … {self.num_classes - 1}."
            )


def as_arrays(pair: Any, where: str, class_labels: bool = True) -> tuple[Array, Array]:
    """Return `(x, y)` as contiguous numpy arrays (x float32 or int64; y int64 when labels are classes).

    Args:
        pair: A pair of arrays, tensors or sequences; or a `Gateway`.
        where: Names the pair in errors.
        class_labels: Whether y must be class indices.

    Raises:
        InputError: Not a pair, empty, lengths differ, not numeric, not finite, labels negative or not whole.
    """
    if isinstance(pair, Gateway):
        pair = pair.load()
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InputError(f"{where} is {type(pair).__name__}; it must be a pair (x, y) of arrays.")
    x, y = (_numeric(part, f"{where}: {name}") for part, name in zip(pair, "xy", strict=True))
    if x.ndim == 0 or y.ndim == 0:
        raise InputError(f"{where} holds single numbers; x and y must be arrays with one entry a record.")
    if len(x) == 0:
        raise InputError(f"{where} is empty; each gateway and the test data must hold at least one record.")
    if len(x) != len(y):
        raise InputError(f"{where}: x has {len(x)} records and y has {len(y)}; they must be equally many.")
    if x.size == 0:
        raise InputError(f"{where}: x has shape {x.shape}; a record must hold at least one value.")
    x = _finite(_contiguous(x), f"{where}: x")
    if not class_labels:
        return x, _finite(_contiguous(y), f"{where}: y")
    if y.ndim != 1:
        raise InputError(f"{where}: y has shape {y.shape}; it must be one class index a record, shape ({len(y)},).")
    _finite(y, f"{where}: y")
    if (y != np.floor(y)).any():
        bad = y[y != np.floor(y)][0]
        raise InputError(f"{where}: label {bad:g} is no whole number; labels are class indices from 0 on.")
    if int(y.min()) < 0 or int(y.max()) >= 2**63:
        bad = y.min() if y.min() < 0 else y.max()
        raise InputError(f"{where}: label {bad} is out of range; labels are class indices from 0 on.")
    return x, np.ascontiguousarray(y, np.int64)


def _finite(values: Array, where: str) -> Array:
    finite = np.isfinite(values)
    if not finite.all():
        bad = int(np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))[0])
        raise InputError(
            f"{where} of record {bad} is NaN or infinite; all values must be finite float32 numbers: clean the data."
        )
    return values


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


def _contiguous(array: Array) -> Array:
    kind = np.int64 if np.issubdtype(array.dtype, np.integer) else np.float32
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused as such
        return np.ascontiguousarray(array, kind)


@dataclass(frozen=True)
class CutShards:
    """Shards cut from one data set by index; the arrays are shared, a shard is copied when it is asked for.

    Args:
        x: `[N, …]`, checked.
        y: `[N]`, checked.
        indices: One sorted index array a gateway, disjoint.
    """

    x: Array
    y: Array
    indices: Sequence[npt.NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        chosen = self.indices[index]
        return self.x[chosen], self.y[chosen]


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
        x, y = as_arrays(pair, where, class_labels=self._rules.num_classes is not None)
        self._rules.check(x, y, where)
        # Copies: the arrays may be read-only views of memory that other processes share.
        shard = Shard(x=torch.from_numpy(x.copy()), y=torch.from_numpy(y.copy()))
        self._kept[gateway] = shard
        self._size_bytes += shard.size_bytes
        while self._size_bytes > self._limit_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._size_bytes -= dropped.size_bytes
        return shard
