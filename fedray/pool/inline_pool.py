"""Runs all gateways in this process, with the results of Ray actors, but with breakpoints and plain stack traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.aggregation import GroupResult
from fedray.pool.placement import groups_of
from fedray.pool.pool import Inspection, PoolInfo, cohort_by_group
from fedray.pool.worker import Worker, WorkerSetup, resolve_device
from fedray.privacy.streams import RoundKeys


class InlinePool:
    """Trains one group after the other on one thread.

    Args:
        setup: See `WorkerSetup`.
        gateways: How many.
        gateways_per_actor: "auto" (all in one group) or a number.
        device: --device.
    """

    def __init__(self, setup: WorkerSetup, gateways: int, gateways_per_actor: int | str, device: str) -> None:
        size = gateways_per_actor if isinstance(gateways_per_actor, int) else gateways
        self._groups = groups_of(gateways, -(-gateways // size))
        self._setup = setup
        self._device = resolve_device(device)
        self._worker: Worker | None = None
        self._round: Any = None

    def say_at_the_end(self, remedy: str) -> None:
        """Leave it: nothing here ends the process."""

    def describe(self) -> str:
        """See `Pool.describe`."""
        return f"this process, {self._device.type}, 1 thread, one gateway group after the other"

    def inspect(self, modules: Sequence[str], marker: Path | None) -> Inspection:
        """Return nothing: this process has all that it needs."""
        return Inspection()

    def start(self) -> PoolInfo:
        """Build the worker."""
        with one_thread():
            self._worker = Worker(self._setup, self._device)
        return self.info()

    def info(self) -> PoolInfo:
        """See `Pool.info`."""
        return PoolInfo(
            summary=self.describe(),
            groups=self._groups,
            device=self._device.type,
            hardware=(self._started().hardware,),
        )

    def load(self, key: bytes) -> dict[int, str]:
        """See `Pool.load`."""
        found: dict[int, str] = {}
        for group in self._groups:
            found |= self._started().load(group, key)
        return found

    def begin(self, keys: RoundKeys, params: npt.NDArray[np.float32], cohort: Sequence[int]) -> None:
        """Remember the round; `collect` trains it, as there is but one thread."""
        self._round = (keys, params, cohort_by_group(self._groups, cohort))

    def collect(self) -> list[GroupResult]:
        """See `Pool.collect`."""
        keys, params, calls = self._round
        with one_thread():
            return [self._started().train(keys, params, ids) for _, ids in calls]

    def close(self) -> None:
        """Drop the worker."""
        self._worker = None

    def _started(self) -> Worker:
        assert self._worker is not None, "start() comes first"
        return self._worker


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread, as actors do: sums must not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
