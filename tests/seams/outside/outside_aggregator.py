"""The median of each coordinate (Yin et al. 2018)."""

import numpy as np
import numpy.typing as npt


class Median:
    form = "stack"

    def combine(self, values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.median(values, axis=0)
