"""What an actor does: build a trainer once, then train its gateways each round. Plain Python, used by both pools."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fedray.aggregation import weighted_sum
from fedray.data.shards import RecordRules, ShardCache, Shards
from fedray.errors import GatewayError, InputError
from fedray.params import Layout
from fedray.privacy.clipping import clip_rows
from fedray.privacy.levels import level_of
from fedray.streams import RoundKeys
from fedray.training.stacked import StackedTrainer
from fedray.training.trainer import LocalTraining, Trainer

Engine = Literal["opacus", "stacked"]
_LARGEST_STACK_BYTES = 32 * 2**20  # of updates in one answer; past it an actor answers with their sum
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """Everything an actor needs, sent to it once.

    Args:
        model: With its full initial state.
        training: How gateways train.
        shards: Where records come from.
        rules: What they must look like.
        engine: Which trainer.
        memory_limit: Bytes that one actor's training may take; None for its share of half the machine's memory.
    """

    model: torch.nn.Module
    training: LocalTraining
    shards: Shards
    rules: RecordRules
    engine: Engine
    memory_limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """What one actor answers for a round.

    Args:
        gateways: Ids, one row each.
        updates: `[G, P]`; clipped at the `gateway` level. None when the stack would be large: then `total` stands for it.
        weights: One a gateway, or None for 1 each (record counts leave a gateway only when the user asked for it).
        layout_digest: Of the model that made the updates.
        total: `[P]`, the weighted sum of the updates in gateway order, or None.
    """

    gateways: tuple[int, ...]
    updates: npt.NDArray[np.float32] | None
    weights: tuple[float, ...] | None
    layout_digest: str
    total: npt.NDArray[np.float64] | None = None


def resolve_device(device: str) -> torch.device:
    """Return the torch device of --device in this process; GPUs are asked for explicitly.

    Raises:
        InputError: --device cuda without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda but this machine has no GPU that torch can use; use --device cpu or auto.")
    return torch.device("cuda:0" if device != "cpu" and torch.cuda.is_available() else "cpu")


def new_trainer(
    engine: Engine, model: torch.nn.Module, training: LocalTraining, device: torch.device, memory_limit: int = 2**31
) -> Trainer:
    """Return the trainer of an engine."""
    if engine == "stacked":
        return StackedTrainer(model, training, device, memory_limit)
    from fedray.training.reference import OpacusTrainer  # imports Opacus (seconds), which the fast trainer does without

    return OpacusTrainer(model, training, device)


def memory_share(device: torch.device, sharing: int) -> int:
    """Return the default memory limit of one of `sharing` actors of a machine or GPU: its share of one half."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // (2 * sharing)


class Worker:
    """Trains gateways; keeps caches, never state that matters.

    Args:
        setup: See `WorkerSetup`.
        device: Where to train.
        sharing: How many actors share the machine or GPU.
    """

    def __init__(self, setup: WorkerSetup, device: torch.device, sharing: int = 1) -> None:
        limit = memory_share(device, sharing) if setup.memory_limit is None else setup.memory_limit
        self._setup = setup
        self._shards = ShardCache(setup.shards, setup.rules, limit_bytes=max(limit // 4, 1))
        self._trainer = new_trainer(setup.engine, setup.model, setup.training, device, max(limit // 2, 1))
        self._layout = Layout.of(setup.model)
        self._largest_stack = min(limit // 4, _LARGEST_STACK_BYTES)

    def load(self, gateways: Sequence[int]) -> None:
        """Load and check shards before the first round, as far as the cache keeps them.

        Raises:
            InputError: A shard breaks a rule.
        """
        for gateway in gateways:
            self._shards[gateway]

    def train(self, keys: RoundKeys, params: npt.NDArray[np.float32], gateways: Sequence[int]) -> GroupResult:
        """Train gateways for one round.

        Raises:
            GatewayError: The user's code failed, or a gateway's update is not finite.
        """
        weighted = self._setup.training.privacy.weights == "records"
        together = max(1, self._largest_stack // (4 * self._layout.num_params))
        weights: list[float] = []
        total: npt.NDArray[np.float64] | None = None
        updates: npt.NDArray[np.float32] | None = None
        for first in range(0, len(gateways), together):
            part = gateways[first : first + together]
            updates = self._updates(keys, params, part)
            own = [float(self._shards[gateway].num_records) if weighted else 1.0 for gateway in part]
            weights += own
            if len(part) < len(gateways):
                total = weighted_sum(list(updates), own, _CPU, total)
        return GroupResult(
            gateways=tuple(gateways),
            updates=updates if total is None else None,
            weights=tuple(weights) if weighted else None,
            layout_digest=self._layout.digest,
            total=total,
        )

    def _updates(
        self, keys: RoundKeys, params: npt.NDArray[np.float32], gateways: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        privacy = self._setup.training.privacy
        updates = self._trainer.train(keys, params, gateways, self._shards)
        if level_of(privacy).central_noise:
            updates = clip_rows(torch.from_numpy(updates), privacy.clip_norm).numpy()
        broken = np.flatnonzero(~np.isfinite(updates).all(axis=1))
        if len(broken):
            bad = [gateways[row] for row in broken.tolist()]
            raise GatewayError(
                f"gateway {', '.join(map(str, bad))} has an update that is NaN or infinite in round {keys.round_index}; "
                "local training diverged: lower --lr."
            )
        return updates
