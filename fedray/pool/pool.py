"""What the orchestrator asks of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedray.pool.worker import GroupResult
from fedray.streams import RoundKeys


@dataclass(frozen=True, kw_only=True)
class PoolInfo:
    """Where gateways run.

    Args:
        summary: One line for people.
        groups: Gateways of each actor.
        device: "cpu" or "cuda", the same for all actors.
    """

    summary: str
    groups: tuple[range, ...]
    device: str


class Pool(Protocol):
    """Runs gateways. `start` comes first, `close` last."""

    def describe(self) -> str:
        """Return where gateways would run, without starting what trains.

        Raises:
            InputError: The machine or cluster cannot host it.
        """
        ...

    def start(self) -> PoolInfo:
        """Start everything that trains; returns when all of it is ready.

        Raises:
            InputError: The machine or cluster cannot host it.
        """
        ...

    def load(self) -> None:
        """Load and check the shards where gateways train.

        Raises:
            InputError: A shard breaks a rule.
        """
        ...

    def train(self, keys: RoundKeys, params: npt.NDArray[np.float32], cohort: Sequence[int]) -> Sequence[GroupResult]:
        """Train the cohort for a round and return the groups' results in gateway order.

        Raises:
            GatewayError: The user's code failed in a gateway.
            RunFailedError: The pool failed.
        """
        ...

    def close(self) -> None:
        """Stop what `start` started."""
        ...


def members(groups: Sequence[range], cohort: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Return (group index, its gateways in the cohort) for the groups that take part; the cohort is sorted."""
    chosen = np.asarray(cohort, np.int64)
    starts = np.searchsorted(chosen, [group.start for group in groups])
    stops = np.searchsorted(chosen, [group.stop for group in groups])
    return [
        (index, chosen[start:stop].tolist())
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True))
        if stop > start
    ]
