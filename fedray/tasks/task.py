"""The seam of what is learned: what targets mean, the loss of a record, and the metrics of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from fedray.errors import InputError

Array = npt.NDArray[Any]


@runtime_checkable
class Metric(Protocol):
    """A figure of a model on records; it is added up batch by batch."""

    @property
    def name(self) -> str:
        """Its name in metrics.jsonl."""
        ...

    def state(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return what a batch of n records adds, any shape; states of several batches are summed in float64.

        Args:
            output: Of the model, `[n, …]`.
            target: `[n, …]`.
        """
        ...

    def value(self, state: torch.Tensor, num_records: int) -> float:
        """Return the figure from the sum of the states of all records."""
        ...


@runtime_checkable
class Task(Protocol):
    """What is learned. Whoever derives from it defines `losses` and `metrics`; the rest has a default.

    Attributes:
        metrics: Of a model on held-out data, the headline first; may be empty.
    """

    metrics: Sequence[Metric]

    def losses(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return one loss a record `[n]`.

        At private levels it sees one record alone (n = 1), so that a loss that couples records cannot do so.

        Args:
            output: Of the model, `[n, …]`.
            target: `[n, …]`.
        """
        ...

    def check_targets(self, y: Array, where: str) -> Array:
        """Return targets `[N, …]` as `losses` wants them, int64 or float32; by default whole numbers are int64, others float32.

        Args:
            y: Numbers.
            where: Names them in errors.

        Raises:
            InputError: They are not finite, or break a rule of the task.
        """
        return finite(y, where)

    def num_outputs(self, targets: Sequence[Array]) -> int:
        """Return how many outputs a reference model needs for these targets (of shards and test data, checked)."""
        return 1

    def check_outputs(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Check what a model returns for n records.

        Raises:
            InputError: `losses` cannot take it.
        """
        return None

    def check_fit(self, targets: Array, outputs: tuple[int, ...], where: str) -> None:
        """Check targets against the shape of a record's output.

        Raises:
            InputError: A target has no output.
        """
        return None


def finite(values: Array, where: str) -> Array:
    """Return numbers as int64 or float32, contiguous.

    Raises:
        InputError: One is NaN or infinite, or float32 cannot hold it.
    """
    kind = np.int64 if np.issubdtype(values.dtype, np.integer) else np.float32
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused as such
        values = np.ascontiguousarray(values, kind)
    good = np.isfinite(values)
    if not good.all():
        bad = int(np.flatnonzero(~good.reshape(len(values), -1).all(axis=1))[0])
        raise InputError(
            f"{where} of record {bad} is NaN or infinite; all values must be finite float32 numbers: clean the data."
        )
    return values
