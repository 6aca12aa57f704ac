"""Poisson sampling of records: the sampler that the accountant's amplification assumes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys


class PoissonSampler:
    """Draws a gateway's batches: each record is in with probability q, on its own; a batch may be empty.

    Whether record i is in depends on (key, step, i) alone, never on how many records there are.

    Args:
        spec: Gives the public rate q.
        keys: The round's key and attempt.
        gateway: Id of the gateway.
    """

    def __init__(self, spec: PrivacySpec, keys: RoundKeys, gateway: int) -> None:
        self._rate = spec.sample_rate
        self._stream = keys.stream("batches", gateway)

    def batch(self, step: int, num_records: int) -> npt.NDArray[np.int64]:
        """Return the sorted indices of the records in the batch of a local step."""
        return self._stream.bernoulli(step, num_records, self._rate)

    def batches(self, steps: range, num_records: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the batches of several local steps, one after the other, and their sizes: `batch` of each, in one go."""
        return self._stream.bernoulli_steps(steps, num_records, self._rate)
