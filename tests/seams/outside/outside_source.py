"""Two classes that differ in the mean of their first half."""

import numpy as np

from fedray.data.source import Federation, Wanted


class Stripes:
    def load(self, wanted: Wanted) -> Federation:
        rng = np.random.default_rng(0)
        y = rng.integers(0, 2, 600)
        x = rng.normal(size=(600, 8)) + 2.0 * y[:, None] * (np.arange(8) < 4)
        return wanted.cut((x[:500], y[:500]), (x[500:], y[500:]))
