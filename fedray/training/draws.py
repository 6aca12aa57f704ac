"""RoundDraws a group of gateways' batches and noise in a round, from the round's keys and the shards alone.

Neither depends on the parameters, so an actor can draw for the next round while it waits for that round to start.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event

import numpy as np
import numpy.typing as npt
import torch

from fedray.data.inputs import Inputs, leaves, rebuilt
from fedray.data.shards import Shard
from fedray.privacy.noise import LocalNoise
from fedray.privacy.sampling import PoissonSampler
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys

_WINDOW_BYTES = 8 * 2**20  # of records gathered ahead of the steps that use them


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's records of a group, padded to the largest batch.

    Args:
        x: Each tensor `[G, B, …]`.
        y: `[G, B, …]`.
        mask: `[G, B]`, 1 for a record and 0 for padding.
        sizes: `[G]`, records in each gateway's batch.
        drawn: Each gateway's record indices, in this step and others.
        starts: `[G]`, where this step's indices begin in `drawn`.
    """

    x: Inputs
    y: torch.Tensor
    mask: torch.Tensor
    sizes: npt.NDArray[np.int64]
    drawn: Sequence[npt.NDArray[np.int64]]
    starts: npt.NDArray[np.int64]

    def indices(self, row: int) -> npt.NDArray[np.int64]:
        """Return the record indices of a gateway."""
        return self.drawn[row][self.starts[row] : self.starts[row] + self.sizes[row]]


class RoundDraws:
    """The batches and noise of a group of gateways in one round.

    Args:
        privacy: The public constants.
        device: Where batches and noise are needed.
        keys: The round's key and attempt.
        gateways: Ids.
        shards: These gateways' records.
    """

    def __init__(
        self,
        privacy: PrivacySpec,
        device: torch.device,
        keys: RoundKeys,
        gateways: Sequence[int],
        shards: Sequence[Shard],
    ) -> None:
        self.shards = shards
        self.identity = (keys, list(gateways))
        self._privacy = privacy
        self._device = device
        self._noise = LocalNoise(privacy, keys, gateways)
        self._samplers = [PoissonSampler(privacy, keys, gateway) for gateway in gateways]
        self._ahead: list[torch.Tensor] = []
        self._batches = self._windows()

    def serve(self, keys: RoundKeys, gateways: Sequence[int]) -> bool:
        """Tell whether these are the draws of that round and group."""
        return self.identity == (keys, list(gateways))

    def following(self) -> RoundDraws:
        """Return the draws of the same group in the next round, should it be the first attempt at it."""
        keys, gateways = self.identity
        return RoundDraws(self._privacy, self._device, keys.following(), gateways, self.shards)

    def draw_ahead(self, memory: torch.Tensor, stop: Event) -> None:
        """Draw what the round will ask for first, until `stop` is set; the rest is drawn when it is asked for.

        Args:
            memory: `[S, G, P]`, for the noise of the first S steps; it must stay untouched until the round is done.
            stop: Checked between steps.
        """
        self._batches = itertools.chain([*itertools.islice(self._batches, 1)], self._batches)
        for step, out in enumerate(memory):
            if stop.is_set():
                return
            self._noise.fill(step, out.numpy())
            self._ahead.append(out)

    def batches(self) -> Iterator[Batch]:
        """Return the batches of all steps; may be called once."""
        return self._batches

    def noise(self, step: int, memory: torch.Tensor) -> torch.Tensor:
        """Return a step's noise `[G, P]`, in `memory` unless drawn ahead; once only, as the caller overwrites it."""
        if step < len(self._ahead):
            return self._ahead[step]
        if memory.device.type == "cpu":
            self._noise.fill(step, memory.numpy())
        else:
            self._noise.fill_on_device(step, memory)
        return memory

    def _windows(self) -> Iterator[Batch]:
        """Yield the round's batches, gathering records for as many steps at once as the window holds."""
        num_steps = self._privacy.local_steps
        record_bytes = self.shards[0].size_bytes // self.shards[0].num_records
        step_bytes = len(self.shards) * 2 * self._privacy.batch_size * record_bytes
        window = min(num_steps, max(1, _WINDOW_BYTES // max(1, step_bytes)))
        for first in range(0, num_steps, window):
            steps = range(first, min(first + window, num_steps))
            drawn = [
                sampler.batches(steps, shard.num_records)
                for sampler, shard in zip(self._samplers, self.shards, strict=True)
            ]
            yield from self._gather([indices for indices, _ in drawn], np.array([sizes for _, sizes in drawn]))

    def _gather(self, drawn: Sequence[npt.NDArray[np.int64]], sizes: npt.NDArray[np.int64]) -> Iterator[Batch]:
        """Yield the batches of some steps.

        Args:
            drawn: Each gateway's records, step after step.
            sizes: `[G, S]`, how many each step has.
        """
        widths = sizes.max(0)
        ends = np.cumsum(widths)
        step_of = np.repeat(np.arange(len(widths)), widths)
        present = np.arange(ends[-1]) - (ends - widths)[step_of] < sizes[:, step_of]  # [G, W]: steps side by side
        index = np.zeros(present.shape, np.int64)
        index[present] = np.concatenate(drawn)
        columns = zip(*([*leaves(shard.x), shard.y] for shard in self.shards), strict=True)
        parts = [_gathered(column, index) for column in columns]
        parts.append(torch.from_numpy(present.astype(np.float32)))
        by_step = zip(*(torch.split(part.to(self._device), widths.tolist(), 1) for part in parts), strict=True)
        starts = np.cumsum(sizes, axis=1) - sizes
        for step, (*x_of, y_of, mask) in enumerate(by_step):
            x = rebuilt(self.shards[0].x, x_of)
            yield Batch(x=x, y=y_of, mask=mask, sizes=sizes[:, step], drawn=drawn, starts=starts[:, step])


def _gathered(parts: Sequence[torch.Tensor], index: npt.NDArray[np.int64]) -> torch.Tensor:
    """Return `[G, W, …]`, the records `index` `[G, W]` of each gateway's tensor `[N, …]`."""
    found = parts[0].new_empty((*index.shape, *parts[0].shape[1:]))
    for part, chosen, out in zip(parts, torch.from_numpy(index), found, strict=True):
        torch.index_select(part, 0, chosen, out=out)
    return found
