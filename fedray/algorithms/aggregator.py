"""The seam of aggregators: how uploads become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

_BLOCK_BYTES = 64 * 2**20  # of a block of all gateways' values


@runtime_checkable
class Aggregator(Protocol):
    """Makes one vector of many.

    Attributes:
        form: "sum": all it needs is the average, which adds up as answers come. "stack": it needs each gateway's values;
            that is post-processing where gateways noise what they upload, and refused at the `gateway` level, whose noise
            is for a sum.
    """

    form: Literal["sum", "stack"]

    def combine(self, values: Float64Array, weights: Float64Array) -> Float64Array:
        """Return the aggregate `[p]` of a block of coordinates.

        Args:
            values: "stack": `[n, p]`, one row a gateway that arrived. "sum": `[1, p]`, the average as it was released.
            weights: `[n]`, of the rows: 1 each, or record counts; "sum": 1.
        """
        ...


class Mean:
    """The weighted average."""

    form: Literal["sum", "stack"] = "sum"

    def combine(self, values: Float64Array, weights: Float64Array) -> Float64Array:
        """Return the average itself."""
        average: Float64Array = values[0]
        return average


def combined(
    aggregator: Aggregator, rows: Sequence[Float32Array | Float64Array], weights: Sequence[float]
) -> Float64Array:
    """Return the aggregate `[W]` of rows `[W]`, by an aggregator in stack form, in blocks of coordinates that fit memory."""
    size = len(rows[0])
    width = max(1, _BLOCK_BYTES // (8 * len(rows)))
    found = np.empty(size)
    for first in range(0, size, width):
        block = np.stack([row[first : first + width] for row in rows]).astype(np.float64)
        found[first : first + width] = aggregator.combine(block, np.array(weights))
    return found
