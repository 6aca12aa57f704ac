"""Random numbers of records (Dropout and the like): a function of (key, gateway, step, record), never of the batch.

Each word is a hash of the record's number and its own place, under a key of the gateway and step. These draws hide nothing
(no guarantee rests on them), so a fast mixing function does: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedray.privacy.streams import RoundKeys, derive_key
from fedray.training.program import Draw

Words = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class RecordDraws:
    """The random numbers that the records of a group of gateways draw in a round.

    Args:
        draws: What one record's forward pass draws, in order.
        keys: The round's key and attempt.
        gateways: Ids.
        device: Where they are needed.
    """

    def __init__(self, draws: Sequence[Draw], keys: RoundKeys, gateways: Sequence[int], device: torch.device) -> None:
        self._draws = draws
        self._keys = [keys.key("model draws", gateway) for gateway in gateways] if draws else []
        self._device = device
        # A normal takes two words.
        self._sizes = [math.prod(draw.shape) * (2 if draw.law == "normal" else 1) for draw in draws]

    def of(self, step: int, records: npt.NDArray[np.int64]) -> list[torch.Tensor]:
        """Return each draw `[m·b, *shape]` of records `[m, b]`, by their indices, in a local step."""
        if not self._draws:
            return []
        keys = [int.from_bytes(derive_key(key, "step", step)[:8], "big") for key in self._keys]
        with np.errstate(over="ignore"):  # it is meant to wrap around
            of_records = _mixed(np.array(keys, np.uint64)[:, None] + records.astype(np.uint64) * _GOLDEN)
            places = np.arange(1, sum(self._sizes) + 1, dtype=np.uint64) * _GOLDEN
            words = _mixed(of_records.reshape(-1, 1) + places)
        # The highest 24 bits, which float32 holds exactly.
        uniform = torch.from_numpy((words >> np.uint64(40)).astype(np.float32)).mul_(2.0**-24).to(self._device)
        found, start = [], 0
        for draw, size in zip(self._draws, self._sizes, strict=True):
            part = uniform[:, start : start + size]
            if draw.law == "normal":  # Box and Muller (1958)
                first, second = part.chunk(2, 1)
                part = torch.sqrt(-2.0 * torch.log1p(-first)) * torch.cos(2.0 * math.pi * second)
            found.append(part.reshape(-1, *draw.shape))
            start += size
        return found


def _mixed(words: Words) -> Words:
    """Return words whose bits depend on all bits of the input's, in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words
