"""Sums over gateways and the server's step (FedAvg, McMahan et al. 2017, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


def weighted_sum(
    rows: Sequence[Float32Array], weights: Sequence[float], device: torch.device, start: Float64Array | None = None
) -> Float64Array:
    """Return the weighted sum of updates in float64, one after the other, so that grouping does not change its bits.

    Args:
        rows: Updates `[P]`, in gateway order, at least one.
        weights: One a row.
        device: Where to add up: the orchestrator's GPU when it has one.
        start: Sum to go on from (updated in place), or None.
    """
    if device.type == "cuda":
        matrix = torch.from_numpy(np.stack(rows)).to(device).double()
        matrix *= torch.tensor(weights, dtype=torch.float64, device=device).unsqueeze(1)
        result: Float64Array = matrix.sum(dim=0).cpu().numpy()
        return result if start is None else np.add(start, result, out=start)
    total = np.zeros(rows[0].shape, np.float64) if start is None else start
    for row, weight in zip(rows, weights, strict=True):
        total += row if weight == 1.0 else row * np.float64(weight)
    return total


@dataclass
class FedAvg:
    """The server that adds the average update to the parameters (learning rate 1, no state)."""

    def step(self, params: Float32Array, mean_update: Float64Array) -> Float32Array:
        """Return the next parameters `[P]`."""
        return (params + mean_update).astype(np.float32)
