"""The seam of server optimizers: how the average update moves the model (Reddi et al. 2021, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
State = Mapping[str, npt.NDArray[Any]]


@runtime_checkable
class ServerOptimizer(Protocol):
    """Moves the model by average updates; it sees nothing else, so that it is post-processing at every level."""

    def step(self, params: Float32Array, update: Float64Array, state: State) -> tuple[Float32Array, State]:
        """Return the next parameters `[P]` and the optimizer's state.

        Args:
            params: `[P]`.
            update: `[P]`, the average update, whose negative is the pseudo-gradient; may be overwritten.
            state: Arrays by name, as the last round returned them; empty in the first. They are kept in checkpoints.
        """
        ...


class ServerSGD:
    """Gradient descent at rate 1: the average update is added (McMahan et al. 2017)."""

    def step(self, params: Float32Array, update: Float64Array, state: State) -> tuple[Float32Array, State]:
        """See `ServerOptimizer.step`."""
        return np.add(params, update, out=update).astype(np.float32), state
