"""The seam between pools and trainers, and what tests and audits may observe of a local step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.algorithm import Algorithm
from fedray.algorithms.fedavg import FedAvg
from fedray.data.shards import Shard
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys
from fedray.tasks.own_loss import Loss

Float32Array = npt.NDArray[np.float32]
NOT_THE_BATCH = "a layer's first dimension is not the batch, so its gradients are not one a record"


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """How a gateway trains; the same for all gateways.

    Args:
        privacy: The public constants of the private mechanism.
        optimizer: Fresh each round.
        lr: Its learning rate.
        loss: Maps (output, target) to one value a record.
        algorithm: What becomes of gradients, and what is uploaded.
    """

    privacy: PrivacySpec
    optimizer: Literal["adam", "sgd"]
    lr: float
    loss: Loss
    algorithm: Algorithm = FedAvg()


class GatewayShards(Protocol):
    """Gives a gateway's checked shard by id."""

    def __getitem__(self, gateway: int, /) -> Shard: ...


class Trainer(Protocol):
    """Trains gateways for one round: a pure function of its arguments.

    `observer`, when set, sees every local step (tests and audits set it; a run does not).
    """

    observer: StepObserver | None

    def train(
        self, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
    ) -> Float32Array:
        """Return what gateways upload, `[G, W]`: with FedAvg params after local training − params received, W = P.

        Args:
            keys: The round's key and attempt.
            params: `[P]`, what the orchestrator sent.
            gateways: Ids; the rows are in their order.
            shards: Gives each gateway's records.

        Raises:
            GatewayError: The user's code failed in a gateway.
        """
        ...

    def draw_ahead(self, stop: Event) -> None:
        """Draw for the round after the last one, while nothing trains, until `stop` is set; it changes no result."""
        ...


@dataclass(frozen=True, kw_only=True)
class Release:
    """What one gateway's local step does under `sample` or `batch`.

    Args:
        gateway: Its id.
        step: From 0.
        batch: Indices of the sampled records.
        clipped: `[P]`: `sample`: sum of clipped gradients; `batch`: clipped mean gradient.
        noise: `[P]`, what is added to it.
        divisor: What the sum is divided by: B for `sample`, 1 for `batch`.
    """

    gateway: int
    step: int
    batch: npt.NDArray[np.int64]
    clipped: Float32Array
    noise: Float32Array
    divisor: float


class StepObserver(Protocol):
    """Sees and may steer local steps; for tests and audits."""

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        """Return the clipped value `[P]` to release instead (an audit adds its canary here)."""
        ...

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient `[P]` for the optimizer (a replay returns a recorded one)."""
        ...
