"""What a pool, which runs gateways, must do for the orchestrator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedray.algorithms.aggregation import GroupResult
from fedray.privacy.streams import RoundKeys


@dataclass(frozen=True, kw_only=True)
class PoolInfo:
    """Where gateways run.

    Args:
        summary: One line for people.
        groups: Gateways of each actor.
        device: "cpu" or "cuda", the same for all actors.
        hardware: Each actor's `Worker.hardware`, which decides how its results are rounded; as last heard.
    """

    summary: str
    groups: tuple[range, ...]
    device: str
    hardware: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FailurePolicy:
    """How a pool treats lost actors, late rounds and GPUs that are not free.

    Args:
        max_failures: How many lost actors a run replaces.
        round_timeout_s: Seconds that a round may take.
        drop: Go on without gateways that failed instead of ending the run.
        placement_timeout_s: Seconds to wait for GPUs that the cluster has and somebody else holds.
    """

    max_failures: int
    round_timeout_s: float
    drop: bool
    placement_timeout_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a check of the machines found that would run gateways.

    Args:
        rows: Name and text, for people.
        remarks: Sentences about what the user should know.
    """

    rows: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()


class Pool(Protocol):
    """Runs gateways. `start` comes first, `close` last; each `begin` is followed by `collect`."""

    def say_at_the_end(self, remedy: str) -> None:
        """Take what a last sentence ends with, should the pool have to end the process: how the run can go on."""
        ...

    def describe(self) -> str:
        """Return where gateways would run, without starting what trains.

        Raises:
            InputError: The machine or cluster cannot host it.
        """
        ...

    def inspect(self, modules: Sequence[str], marker: Path | None) -> Inspection:
        """Check every machine of a cluster: versions, free resources, the user's modules, a shared directory.

        Args:
            modules: Names that must be importable everywhere.
            marker: A file in the directory that should be shared; None to ask for none.

        Raises:
            InputError: Gateways would not run somewhere; says where, and why.
        """
        ...

    def start(self) -> PoolInfo:
        """Start everything that trains; returns when all of it is ready.

        Raises:
            InputError: The machine or cluster cannot host it.
        """
        ...

    def info(self) -> PoolInfo:
        """Return where gateways run: as `start` said, but for actors that were replaced on other hardware since."""
        ...

    def load(self, key: bytes) -> dict[int, str]:
        """Load and check the shards where gateways train; return their MACs under `key`.

        Raises:
            InputError: A shard breaks a rule.
        """
        ...

    def begin(self, keys: RoundKeys, params: npt.NDArray[np.float32], cohort: Sequence[int]) -> None:
        """Broadcast parameters and let the cohort train; the caller may do other work meanwhile."""
        ...

    def collect(self) -> list[GroupResult]:
        """Return the results of the round that began, in gateway order; with drops, without those that failed.

        Raises:
            GatewayError: The user's code failed in a gateway.
            RunFailedError: The pool failed.
        """
        ...

    def close(self) -> None:
        """Stop what `start` started."""
        ...


def cohort_by_group(groups: Sequence[range], cohort: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Return (group index, its gateways in the cohort) for the groups that take part; the cohort is sorted."""
    chosen = np.asarray(cohort, np.int64)
    starts = np.searchsorted(chosen, [group.start for group in groups])
    stops = np.searchsorted(chosen, [group.stop for group in groups])
    return [
        (index, chosen[start:stop].tolist())
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True))
        if stop > start
    ]
