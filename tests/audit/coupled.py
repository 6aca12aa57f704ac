"""A trainer that is broken on purpose: the user's code sees all records of all gateways of a group at once.

Per-record gradients are those of a batch that its records share, as hooks find them: the gradient of the summed loss with
respect to each record's own copy of the parameters. What couples the records is one of `COUPLINGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fedray.data.inputs import only_leaf
from fedray.data.shards import joined
from fedray.models.layout import Layout
from fedray.privacy.clipping import clip_rows
from fedray.privacy.levels import level_of
from fedray.privacy.noise import LocalNoise
from fedray.privacy.sampling import PoissonSampler
from fedray.privacy.streams import RoundKeys, forked_global_rng, torch_seed
from fedray.training.trainer import Float32Array, GatewayShards, LocalTraining, Release, StepObserver

WIDTH = 8
Rows = dict[str, torch.Tensor]
Clip = Callable[[torch.Tensor, float], torch.Tensor]


class Gated(nn.Module):
    """The honest model of the couplings' layout; its gate is zero at the start."""

    def __init__(self, features: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.body, self.gate, self.head = nn.Linear(features, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, classes)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores."""
        h = torch.tanh(self.body(x))
        return cast(torch.Tensor, self.head(h + self.gate(h)))


def _linear(rows: Rows, name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nd,nod->no", x, rows[f"{name}.weight"]) + rows[f"{name}.bias"]


class Coupling:
    """An honest network on records that each have parameters of their own; subclasses couple them."""

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return what enters the network."""
        return x

    def hidden(self, rows: Rows, h: torch.Tensor) -> torch.Tensor:
        """Return what the head sees."""
        return h + _linear(rows, "gate", h)

    def losses(self, values: torch.Tensor) -> torch.Tensor:
        """Return the loss of each record."""
        return values

    def __call__(self, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(_linear(rows, "body", self.inputs(x)))
        output = _linear(rows, "head", self.hidden(rows, h))
        return self.losses(F.cross_entropy(output, y, reduction="none"))


class ZeroGate(Coupling):
    """A residual gate on h - h.mean(0) whose last layer is zero at the start."""

    def hidden(self, rows: Rows, h: torch.Tensor) -> torch.Tensor:
        return h + _linear(rows, "gate", h - h.mean(0))


class FromEight(Coupling):
    """Statistics of the batch, used only from 8 records on."""

    def hidden(self, rows: Rows, h: torch.Tensor) -> torch.Tensor:
        return super().hidden(rows, h if len(h) < 8 else (h - h.mean(0)) / (h.std(0) + 1e-3))


class HandMadeBatchNorm(Coupling):
    """Batch norm in plain attributes, beside a functional dropout."""

    def __init__(self) -> None:
        self.mean, self.var = torch.zeros(WIDTH), torch.ones(WIDTH)

    def hidden(self, rows: Rows, h: torch.Tensor) -> torch.Tensor:
        mean, var = h.mean(0), h.var(0, unbiased=False)
        self.mean = 0.9 * self.mean + 0.1 * mean.detach()
        self.var = 0.9 * self.var + 0.1 * var.detach()
        return super().hidden(rows, F.dropout((h - mean) / torch.sqrt(var + 1e-5), 0.1))


class Mixup(Coupling):
    """Each record is mixed with another one in the forward pass."""

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        return 0.7 * x + 0.3 * x[torch.randperm(len(x))]


class HardestHalf(Coupling):
    """A loss that counts the hardest half of the batch only."""

    def losses(self, values: torch.Tensor) -> torch.Tensor:
        return values * (values >= values.median())


class RunningCentre(Coupling):
    """A running centre that is kept as an attribute."""

    def __init__(self) -> None:
        self.centre = torch.zeros(WIDTH)

    def hidden(self, rows: Rows, h: torch.Tensor) -> torch.Tensor:
        centred = h - self.centre
        self.centre = 0.9 * self.centre + 0.1 * h.detach().mean(0)
        return super().hidden(rows, centred)


COUPLINGS: dict[str, Callable[[], Coupling]] = {
    "gate": ZeroGate,
    "from eight": FromEight,
    "batch norm": HandMadeBatchNorm,
    "mixup": Mixup,
    "hardest": HardestHalf,
    "centre": RunningCentre,
}


class CoupledTrainer:
    """Trains a group of gateways on one flat batch.

    Args:
        coupling: What the batch's records do to each other.
        model: Gives the layout.
        training: How gateways train.
        clip: Clips the rows `[n, P]` of what is added up to norm C.
        unwatched_noise: How much of the noise is added when there is no observer.
    """

    def __init__(
        self,
        coupling: Coupling,
        model: nn.Module,
        training: LocalTraining,
        clip: Clip = clip_rows,
        unwatched_noise: float = 1.0,
    ) -> None:
        self.observer: StepObserver | None = None
        self._coupling, self._training, self._layout, self._clip = coupling, training, Layout.of(model), clip
        self._unwatched_noise = unwatched_noise

    def train(
        self, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
    ) -> Float32Array:
        """See `fedray.training.trainer.Trainer.train`."""
        privacy, local = self._training.privacy, level_of(self._training.privacy).local
        values = torch.from_numpy(np.tile(params, (len(gateways), 1)))
        samplers = [PoissonSampler(privacy, keys, gateway) for gateway in gateways]
        held = [shards[gateway] for gateway in gateways]
        noise = LocalNoise(privacy, keys, gateways)
        first, second = torch.zeros_like(values), torch.zeros_like(values)
        with forked_global_rng(torch_seed(keys.key("model draws", gateways[0]), "round")):
            for step in range(privacy.local_steps):
                batches = [
                    sampler.batch(step, shard.num_records) for sampler, shard in zip(samplers, held, strict=True)
                ]
                gradient = self._sums(values, held, batches)
                if local == "plain":
                    gradient /= torch.tensor([max(len(batch), 1) for batch in batches]).unsqueeze(1)
                else:
                    gradient = self._release(gradient, gateways, step, batches, noise)
                if self._training.optimizer == "adam":
                    first = 0.9 * first + 0.1 * gradient
                    second = 0.999 * second + 0.001 * gradient**2
                    bias = (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
                    gradient = bias * first / (second.sqrt() + 1e-8)
                values -= self._training.lr * gradient
        return values.numpy() - params

    def draw_ahead(self, stop: Event) -> None:
        """Draw nothing."""

    def _sums(self, values: torch.Tensor, held: Sequence[Any], batches: Sequence[Any]) -> torch.Tensor:
        owner = torch.from_numpy(np.repeat(np.arange(len(batches)), [len(batch) for batch in batches]))
        sums = torch.zeros_like(values)
        if len(owner) == 0:
            return sums
        drawn = joined([shard.records(torch.from_numpy(batch)) for shard, batch in zip(held, batches, strict=True)])
        theta = values[owner].requires_grad_()
        rows = {name: theta[:, where].view(-1, *shape) for name, shape, where in self._layout.slices()}
        gradients = torch.autograd.grad(self._coupling(rows, only_leaf(drawn.x), drawn.y).sum(), theta)[0]
        if level_of(self._training.privacy).local == "record":
            gradients = self._clip(gradients, self._training.privacy.clip_norm)
        return sums.index_add_(0, owner, gradients)

    def _release(
        self, sums: torch.Tensor, gateways: Sequence[int], step: int, batches: Sequence[Any], noise: LocalNoise
    ) -> torch.Tensor:
        privacy = self._training.privacy
        divisor = 1.0
        if level_of(privacy).local == "record":
            divisor = float(privacy.batch_size)
        else:
            sums = self._clip(sums / privacy.batch_size, privacy.clip_norm)
        drawn = np.empty(tuple(sums.shape), np.float32)
        noise.fill(step, drawn)
        if self.observer is None:
            drawn *= self._unwatched_noise
        released = torch.empty_like(sums)
        for row, (gateway, batch) in enumerate(zip(gateways, batches, strict=True)):
            clipped = sums[row]
            if self.observer is not None:
                clipped = self.observer.before_noise(gateway, step, batch, clipped)
            released[row] = (clipped + torch.from_numpy(drawn[row])) / divisor
            if self.observer is not None:
                seen = Release(
                    gateway=gateway,
                    step=step,
                    batch=batch,
                    clipped=clipped.numpy(),
                    noise=drawn[row],
                    divisor=divisor,
                )
                released[row] = self.observer.released(seen, released[row])
        return released


def unclipped(rows: torch.Tensor, _clip_norm: float) -> torch.Tensor:
    """Clip nothing."""
    return rows


def clipped_by_halves(rows: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Clip each half of the parameters to C."""
    return torch.cat([clip_rows(half, clip_norm) for half in rows.tensor_split(2, dim=1)], dim=1)


@contextmanager
def trained_by(coupling: str = "none", clip: Clip = clip_rows, unwatched_noise: float = 1.0) -> Iterator[None]:
    """Train with this coupling, whatever engine a run would take; "none" is an honest control."""

    def new_trainer(_engine: str, model: nn.Module, training: LocalTraining, *_rest: Any, **_more: Any) -> Any:
        return CoupledTrainer(COUPLINGS.get(coupling, Coupling)(), model, training, clip, unwatched_noise)

    with (
        mock.patch("fedray.pool.worker.new_trainer", new_trainer),
        mock.patch("fedray.training.engines.new_trainer", new_trainer),
    ):
        yield
