"""The toy data set: four Gaussian classes in sixteen dimensions, the same whatever the seed of a run.

Class k is N(0.7 · row k of the 16×16 Sylvester–Hadamard matrix, I); the best possible accuracy is about 0.94.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedray.data.partition import Dirichlet, Iid
from fedray.data.shards import as_arrays
from fedray.data.source import Federation, Wanted
from fedray.errors import InputError
from fedray.privacy.streams import numpy_generator

NUM_CLASSES = 4
NUM_FEATURES = 16
NUM_TEST = 4000
DEFAULT_RECORDS = 4096
_MOST_RECORDS = 10**7  # 2 GB while a shard is drawn
_PUBLIC_KEY = b"fedray toy data, a public key..."


def hadamard(order: int) -> npt.NDArray[np.float32]:
    """Return the Sylvester–Hadamard matrix of a power-of-two order."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _draw(
    rng: np.random.Generator, records: int, shares: npt.NDArray[np.float64] | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    labels = rng.choice(NUM_CLASSES, size=records, p=shares)
    means = 0.7 * hadamard(NUM_FEATURES)[:NUM_CLASSES]
    return means[labels] + rng.standard_normal((records, NUM_FEATURES), np.float32), labels


def held_out() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the 4000 public test records."""
    return _draw(numpy_generator(_PUBLIC_KEY, "test"), NUM_TEST, None)


class Toy:
    """--dataset toy."""

    def load(self, wanted: Wanted) -> Federation:
        """Return shards that are drawn where they are needed, and the 4000 public test records."""
        partitioner = wanted.partitioner
        if not isinstance(partitioner, Iid | Dirichlet):
            raise InputError(
                f"--partition is {wanted.partition!r} with --dataset toy, whose shards are drawn one by one; it must be iid or "
                "dirichlet:ALPHA."
            )
        alpha = partitioner.alpha if isinstance(partitioner, Dirichlet) else None
        records = wanted.samples_per_gateway or DEFAULT_RECORDS
        test = as_arrays(held_out(), "--dataset toy: test", wanted.task)
        if records > _MOST_RECORDS:
            raise InputError(
                f"--samples-per-gateway is {records} with --dataset toy; it must be at most {_MOST_RECORDS:,}."
            )
        return Federation(
            shards=ToyShards(wanted.gateways, records, alpha),
            test=test,
            nominal_records=records,
            example=test,
            num_outputs=wanted.task.num_outputs([test[1]]),
            lazy=False,
            disjoint=True,
            generated=True,
        )


@dataclass(frozen=True)
class ToyShards:
    """Shards that are drawn when they are asked for, so that a million gateways cost nothing until they train.

    Args:
        gateways: How many.
        records: Records of each gateway.
        alpha: Dirichlet concentration of each gateway's label shares; None for equal shares.
    """

    gateways: int
    records: int
    alpha: float | None = None

    def __len__(self) -> int:
        return self.gateways

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        if not 0 <= index < self.gateways:
            raise IndexError(index)
        rng = numpy_generator(_PUBLIC_KEY, "gateway", index)
        shares = None if self.alpha is None else rng.dirichlet(np.full(NUM_CLASSES, self.alpha))
        return _draw(rng, self.records, shares)
