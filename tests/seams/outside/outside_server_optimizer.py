"""The average update rolls on (Polyak 1964)."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.algorithms.server_optimizer import State


class HeavyBall:
    def step(self, params: npt.NDArray[Any], update: npt.NDArray[Any], state: State) -> tuple[npt.NDArray[Any], State]:
        velocity = 0.5 * state.get("velocity", np.zeros_like(update)) + update
        return (params + velocity).astype(np.float32), {"velocity": velocity}
