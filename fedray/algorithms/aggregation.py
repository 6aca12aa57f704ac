"""What actors answer with, and the sum over gateways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedray.errors import RunFailedError
from fedray.models.layout import Layout

_BLOCK = 16_384  # values
_ROWS = 16  # on a GPU at a time
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """What one actor answers for a round.

    Args:
        gateways: Ids, one row each.
        updates: `[G, W]`, what each uploads; clipped at the `gateway` level. None when it is large: then `total` stands for it.
        weights: One a gateway, or None for 1 each (record counts leave a gateway only when the user asked for it).
        layout_digest: Of the model that made the updates.
        total: `[W]`, the weighted sum of the updates in gateway order, or None.
        failures: What was wrong with the gateways that were left out, a sentence each.
    """

    gateways: tuple[int, ...]
    updates: npt.NDArray[np.float32] | None
    weights: tuple[float, ...] | None
    layout_digest: str
    total: npt.NDArray[np.float64] | None = None
    failures: tuple[str, ...] = ()


def weighted_sum(
    rows: Sequence[Float32Array | Float64Array],
    weights: Sequence[float],
    device: torch.device,
    start: Float64Array | None = None,
) -> Float64Array:
    """Return the weighted sum of updates in float64, one after the other.

    Args:
        rows: Updates or sums of updates, `[P]` each, in gateway order, at least one.
        weights: One a row.
        device: Where to add up: the orchestrator's GPU when it has one.
        start: Sum to go on from (updated in place), or None.
    """
    if device.type == "cuda":
        result = matrix_sum(rows, weights, device)
        return result if start is None else np.add(start, result, out=start)
    total = np.empty(rows[0].shape, np.float64) if start is None else start
    for first in range(0, len(total), _BLOCK):  # a block of the sum stays in the cache while all rows are added
        block = total[first : first + _BLOCK]
        if start is None:
            block.fill(0.0)
        for row, weight in zip(rows, weights, strict=True):
            part = row[first : first + _BLOCK]
            block += part if weight == 1.0 else part * np.float64(weight)
    return total


def matrix_sum(
    rows: Sequence[Float32Array | Float64Array], weights: Sequence[float], device: torch.device
) -> Float64Array:
    """Return `weighted_sum` by a few operations on matrices, whose order of adding up is the device's."""
    total = torch.zeros(len(rows[0]), dtype=torch.float64, device=device)
    for first in range(0, len(rows), _ROWS):
        matrix = torch.from_numpy(np.stack(rows[first : first + _ROWS])).to(device).double()
        own = torch.tensor(weights[first : first + _ROWS], dtype=torch.float64, device=device)
        total += (matrix * own.unsqueeze(1)).sum(dim=0)
    found: Float64Array = total.cpu().numpy()
    return found


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """A round's uploads.

    Args:
        total: `[W]`, their weighted sum in gateway order.
        weight: The sum of the weights.
        arrived: Gateways that are in it.
        rows: Each gateway's, `[W]`, where they are asked for; they lie in memory that answers came in.
        weights: One a row.
    """

    total: Float64Array
    weight: float
    arrived: list[int]
    rows: list[Float32Array | Float64Array] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def gather(
    results: Sequence[GroupResult],
    layout: Layout,
    device: torch.device,
    round_index: int = 1,
    *,
    uploads: int = 1,
    keep_rows: bool = False,
) -> Gathered:
    """Add up the groups' uploads in gateway order, in one pass over the memory that they take.

    Args:
        results: In gateway order.
        layout: Of the orchestrator's model.
        device: Where to add up.
        round_index: For messages.
        uploads: How many vectors each gateway uploads; W = P · uploads.
        keep_rows: Whether each gateway's upload is wanted, too; they came one by one then.

    Raises:
        RunFailedError: A group answered with another layout or shape, or with values that are not finite.
    """
    rows: list[Float32Array | Float64Array] = []
    row_weights: list[float] = []
    weight = 0.0
    for result in results:
        if not result.gateways:
            continue
        values = _values(result, layout, uploads)
        weights = result.weights or [1.0] * len(result.gateways)
        weight += sum(weights)
        rows += [values] if result.updates is None else list(values)
        row_weights += [1.0] if result.updates is None else weights
    with np.errstate(over="ignore", invalid="ignore"):
        total = weighted_sum(rows, row_weights, device) if rows else np.zeros(uploads * layout.num_params)
        suspicious = not np.isfinite(total.sum())  # cheap; it may overflow, so the values themselves decide
    if suspicious:
        for result in results:
            _check_finite(result, round_index)
    arrived = [gateway for result in results for gateway in result.gateways]
    if not keep_rows:
        return Gathered(total=total, weight=weight, arrived=arrived)
    return Gathered(total=total, weight=weight, arrived=arrived, rows=rows, weights=row_weights)


def _values(result: GroupResult, layout: Layout, uploads: int) -> npt.NDArray[Any]:
    """Return what a group answered with, in the form that it must have."""
    names = f"gateways {result.gateways[0]}–{result.gateways[-1]}"
    if result.layout_digest != layout.digest:
        raise RunFailedError(
            f"{names} answered with another model layout than the orchestrator's; all machines must run the same code."
        )
    values: npt.NDArray[Any] | None = result.updates
    wanted: tuple[int, ...] = (len(result.gateways), uploads * layout.num_params)
    if result.total is not None:
        values, wanted = result.total, wanted[1:]
    if values is None or values.shape != wanted:
        shape = None if values is None else values.shape
        raise RunFailedError(
            f"{names} answered with an array of shape {shape} instead of {wanted}; it was not averaged."
        )
    return values


def _check_finite(result: GroupResult, round_index: int) -> None:
    values = result.updates if result.total is None else result.total
    if values is None or (finite := np.isfinite(values)).all():
        return
    bad = np.flatnonzero(~finite.all(axis=1)).tolist() if finite.ndim == 2 else []
    culprits = ", ".join(str(result.gateways[row]) for row in bad)
    names = f"gateway {culprits}" if bad else f"gateways {result.gateways[0]}–{result.gateways[-1]}"
    raise RunFailedError(
        f"{names} answered with NaN or infinite values in round {round_index}; they were not averaged: perhaps "
        "local training diverged; lower --lr, or use --on-failure drop."
    )
