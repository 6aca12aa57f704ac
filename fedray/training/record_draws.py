"""Random numbers of records (Dropout and the like): a function of (key, gateway, step, record), never of the batch.

A record's words lie at a place of its own in the keystream of its gateway and step, so that they are the same whoever else
is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedray.streams import RoundKeys
from fedray.training.program import Draw

_WORDS_PER_BLOCK = 4  # a block of the keystream is 16 bytes


class RecordDraws:
    """What a gateway's records draw in a round.

    Args:
        draws: Of one record's forward pass, in order.
        keys: The round's key and attempt.
        gateway: Id.
        device: Where they are needed.
    """

    def __init__(self, draws: Sequence[Draw], keys: RoundKeys, gateway: int, device: torch.device) -> None:
        self._draws = draws
        self._stream = keys.stream("model draws", gateway)
        self._device = device
        # A normal takes two words.
        self._sizes = [math.prod(draw.shape) * (2 if draw.law == "normal" else 1) for draw in draws]

    def of(self, step: int, records: npt.NDArray[np.int64]) -> list[torch.Tensor]:
        """Return each draw `[n, *shape]` of these records in a local step."""
        if not self._draws:
            return []
        blocks = -(-sum(self._sizes) // _WORDS_PER_BLOCK)
        words = np.empty((len(records), blocks * _WORDS_PER_BLOCK), np.uint32)
        for row, record in zip(words.view(np.uint8), records.tolist(), strict=True):
            self._stream.seek(step, record * blocks)
            self._stream.fill_bytes(row)
        # The highest 24 bits, which float32 holds exactly.
        uniform = torch.from_numpy((words >> np.uint32(8)).astype(np.float32)).mul_(2.0**-24).to(self._device)
        found, start = [], 0
        for draw, size in zip(self._draws, self._sizes, strict=True):
            part = uniform[:, start : start + size]
            if draw.law == "normal":
                first, second = part.chunk(2, 1)
                part = torch.sqrt(-2.0 * torch.log1p(-first)) * torch.cos(2.0 * math.pi * second)
            found.append(part.reshape(len(records), *draw.shape))
            start += size
        return found
