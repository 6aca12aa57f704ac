"""What an actor does: build a trainer once, then train its gateways each round. Plain Python, used by both pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fedray.data.shards import RecordRules, ShardCache, Shards
from fedray.errors import GatewayError, InputError
from fedray.params import Layout
from fedray.privacy.clipping import clip_rows
from fedray.privacy.levels import level_of
from fedray.streams import RoundKeys
from fedray.training.trainer import LocalTraining, Trainer

Engine = Literal["opacus", "stacked"]


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """Everything an actor needs, sent to it once.

    Args:
        model: With its full initial state.
        training: How gateways train.
        shards: Where records come from.
        rules: What they must look like.
        engine: Which trainer.
    """

    model: torch.nn.Module
    training: LocalTraining
    shards: Shards
    rules: RecordRules
    engine: Engine


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """What one actor answers for a round.

    Args:
        gateways: Ids, one row each.
        updates: `[G, P]`; clipped at the `gateway` level.
        weights: One a row, or None for 1 each (record counts leave a gateway only when the user asked for it).
        layout_digest: Of the model that made the updates.
    """

    gateways: tuple[int, ...]
    updates: npt.NDArray[np.float32]
    weights: tuple[float, ...] | None
    layout_digest: str


def resolve_device(device: str) -> torch.device:
    """Return the torch device of --device in this process; GPUs are asked for explicitly.

    Raises:
        InputError: --device cuda without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda but this machine has no GPU that torch can use; use --device cpu or auto.")
    return torch.device("cuda:0" if device != "cpu" and torch.cuda.is_available() else "cpu")


def new_trainer(engine: Engine, model: torch.nn.Module, training: LocalTraining, device: torch.device) -> Trainer:
    """Return the trainer of an engine."""
    from fedray.training.reference import OpacusTrainer  # imports Opacus (seconds), which the fast trainer does without

    return OpacusTrainer(model, training, device)


class Worker:
    """Trains gateways; keeps caches, never state that matters.

    Args:
        setup: See `WorkerSetup`.
        device: Where to train.
    """

    def __init__(self, setup: WorkerSetup, device: torch.device) -> None:
        self._setup = setup
        self._shards = ShardCache(setup.shards, setup.rules)
        self._trainer = new_trainer(setup.engine, setup.model, setup.training, device)
        self._digest = Layout.of(setup.model).digest

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
        counts = privacy.weights == "records"
        return GroupResult(
            gateways=tuple(gateways),
            updates=updates,
            weights=tuple(float(self._shards[gateway].num_records) for gateway in gateways) if counts else None,
            layout_digest=self._digest,
        )
