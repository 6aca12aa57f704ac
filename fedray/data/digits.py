"""The handwritten digits that scikit-learn ships: 1,797 real 8×8 images (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedray.data.source import Federation, Wanted
from fedray.errors import InputError
from fedray.privacy.streams import numpy_generator

NUM_TEST = 360
_PUBLIC_KEY = b"fedray digits split, a public key"[:32]

Arrays = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


class Digits:
    """--dataset digits."""

    def load(self, wanted: Wanted) -> Federation:
        """Return the 1,437 training images, split over gateways, and the 360 of the test."""
        if wanted.samples_per_gateway is not None:
            raise InputError(
                f"--samples-per-gateway is {wanted.samples_per_gateway} with --dataset digits; it applies to toy and to "
                "lazily loaded shards: leave it out."
            )
        train, test = load()
        return wanted.cut(train, test, "--dataset digits")


def load() -> tuple[Arrays, Arrays]:
    """Return (train, test): 1,437 and 360 images as x `[N, 1, 8, 8]` in [0, 1] and labels; the split is fixed.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # an extra: only this data set needs it
    except ImportError as error:
        raise InputError('--dataset digits needs scikit-learn: pip install "fedray[data]".') from error
    bunch = load_digits()
    x = (bunch.data.astype(np.float32) / 16.0).reshape(-1, 1, 8, 8)
    y = bunch.target.astype(np.int64)
    order = numpy_generator(_PUBLIC_KEY, "split").permutation(len(y))
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    return (x[train], y[train]), (x[test], y[test])
