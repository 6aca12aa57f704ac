"""The fast trainer: all gateways of a group in one batched step.

The parameters of G gateways are one `[G, P]` matrix. A step runs the model once on a padded flat batch, catches each
layer's inputs and output gradients (`fedray.training.layers`), clips per record by norms alone, and adds the clipped
sums onto the step's noise, which is already in the gradient matrix. Groups are cut so that a step's matrices stay in the
processor's cache and under the memory limit; the cut changes results by rounding alone (padding differs; within 1e-5).
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedray.data.shards import Shard
from fedray.errors import FedrayError, GatewayError
from fedray.privacy.clipping import clip_factors, clip_rows, usable
from fedray.privacy.levels import level_of
from fedray.privacy.noise import LocalNoise
from fedray.privacy.sampling import PoissonSampler
from fedray.streams import RoundKeys
from fedray.training.row_optimizers import new_row_optimizer
from fedray.training.stacking import StackedModel
from fedray.training.trainer import NOT_THE_BATCH, Float32Array, GatewayShards, LocalTraining, Release, StepObserver

_CACHE_BYTES = 16 * 2**20  # that a group's step goes over on a CPU: larger groups leave the last-level cache
_FEWEST_TOGETHER = 4  # gateways whose parameters would fit the cache
_WINDOW_BYTES = 8 * 2**20  # of records gathered ahead of the steps that use them
_MATRICES = 5  # parameters, gradients, Adam's two moments, a layer's sums


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """One step's records of a group, padded to the largest batch.

    Args:
        x: `[G·B, …]`.
        y: `[G·B, …]`.
        mask: `[G, B]`, 1 for a record and 0 for padding.
        sizes: `[G]`, records in each gateway's batch.
        indices: Each gateway's record indices.
    """

    x: torch.Tensor
    y: torch.Tensor
    mask: torch.Tensor
    sizes: npt.NDArray[np.int64]
    indices: Sequence[npt.NDArray[np.int64]]


class StackedTrainer:
    """Trains groups of gateways in one batched step.

    Args:
        model: Copied; must be stackable (`fedray.training.stacking.reason_against`).
        training: How gateways train.
        device: Where.
        memory_limit: Bytes that a group's matrices and activations may take.

    Raises:
        Unsupported: A layer is not on the proven list.
    """

    def __init__(
        self, model: torch.nn.Module, training: LocalTraining, device: torch.device, memory_limit: int = 2**31
    ) -> None:
        self.observer: StepObserver | None = None
        self._training = training
        self._device = device
        self._local = level_of(training.privacy).local
        self._model = StackedModel(model, device)
        self._memory_limit = memory_limit
        self._values_per_record: int | None = None

    def train(
        self, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
    ) -> Float32Array:
        """See `fedray.training.trainer.Trainer.train`."""
        updates = np.empty((len(gateways), len(params)), np.float32)
        start = 0
        while start < len(gateways):
            first = shards[gateways[start]]
            group = gateways[start : start + self._group_size(len(params), first)]
            try:
                updates[start : start + len(group)] = self._train_group(keys, params, group, shards)
            except FedrayError:
                raise
            except Exception as error:  # model, loss and data are the user's; they may raise anything
                raise GatewayError(
                    f"{_names(group)} failed in round {keys.round_index}: {type(error).__name__}: {error}",
                    traceback.format_exc(),
                ) from error
            start += len(group)
        return updates

    def _group_size(self, num_params: int, shard: Shard) -> int:
        per_gateway = matrices = 4 * _MATRICES * num_params
        # Inputs, outputs, their gradients and one temporary of each, for batches half as large again as expected.
        per_gateway += int(4 * 4 * 1.5 * self._training.privacy.batch_size * self._record_values(num_params, shard))
        size = self._memory_limit // per_gateway
        if self._device.type == "cpu":
            # Small enough for the cache, but not so small that the calls cost more than the work.
            size = min(size, max(_CACHE_BYTES // per_gateway, _FEWEST_TOGETHER if matrices <= _CACHE_BYTES else 1))
        return max(1, size)

    def _record_values(self, num_params: int, shard: Shard) -> int:
        """Return how many values the stacked layers take in and give out for one record."""
        if self._values_per_record is None:
            self._model.bind(torch.zeros(1, num_params, device=self._device))
            with torch.no_grad():
                self._model.forward(shard.x[:1].to(self._device))
            self._values_per_record = sum(layer.num_values for layer in self._model.layers)
        return self._values_per_record

    @torch.no_grad()
    def _train_group(
        self, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
    ) -> Float32Array:
        privacy = self._training.privacy
        sent = torch.from_numpy(np.array(params, np.float32)).to(self._device)  # a copy: it may be a shared view
        values = sent.repeat(len(gateways), 1)
        self._model.bind(values)
        optimizer = new_row_optimizer(self._training.optimizer, values, self._training.lr)
        noise = LocalNoise(privacy, keys, gateways)
        gradient = torch.empty_like(values)
        batches = self._batches(keys, gateways, [shards[gateway] for gateway in gateways])
        for step, batch in enumerate(batches):
            rows = self._fill(gradient, gateways, step, batch, noise)
            if rows is None or len(rows):
                divisor = float(privacy.batch_size) if self._local == "record" else 1.0
                optimizer.step(gradient, divisor, rows)
        return values.sub_(sent).cpu().numpy()

    def _fill(
        self, gradient: torch.Tensor, gateways: Sequence[int], step: int, batch: _Batch, noise: LocalNoise
    ) -> torch.Tensor | None:
        """Fill the gradient matrix for a step; return the rows that step, or None for all."""
        if self._local == "plain":
            gradient.zero_()
            self._add_gradients(gradient, batch, 1.0 / np.maximum(batch.sizes, 1))
            if batch.sizes.all():
                return None
            return torch.from_numpy(np.flatnonzero(batch.sizes)).to(self._device)
        if self._local == "record" and self.observer is None:
            self._fill_noise(noise, step, gradient)
            self._add_clipped_records(gradient, batch)
            return None
        gradient.zero_()
        if self._local == "record":
            self._add_clipped_records(gradient, batch)
        else:
            self._add_gradients(gradient, batch, np.full(len(gateways), 1.0 / self._training.privacy.batch_size))
            gradient.copy_(clip_rows(gradient, self._training.privacy.clip_norm))
        drawn = torch.empty_like(gradient)
        self._fill_noise(noise, step, drawn)
        if self.observer is None:
            gradient += drawn
        else:
            self._observe(self.observer, gradient, drawn, gateways, step, batch)
        return None

    def _add_gradients(self, gradient: torch.Tensor, batch: _Batch, scales: npt.NDArray[np.float64]) -> None:
        """Set `gradient`, which is zero, to each gateway's gradient sum times its scale."""
        if not len(batch.y):
            return
        weights = batch.mask * torch.from_numpy(scales.astype(np.float32)).to(self._device).unsqueeze(1)
        self._losses_backward(batch, weights)
        layers = self._model.used_layers()
        if any(layer.a.shape[1] != batch.mask.shape[1] for layer in layers):  # gateways would mix
            raise RuntimeError(NOT_THE_BATCH)
        for layer in layers:
            layer.add_sums(gradient, None)
        padded = bool((batch.sizes < batch.mask.shape[1]).any())
        # Padding repeats a record that was not drawn, which must count for nothing; but 0 · NaN is NaN. On a GPU, looking
        # would cost more than selecting.
        if padded and (self._device.type != "cpu" or not bool(torch.isfinite(gradient.sum()))):
            gradient.zero_()
            for layer in layers:
                layer.select(batch.mask.bool())
                layer.add_sums(gradient, None)

    def _add_clipped_records(self, gradient: torch.Tensor, batch: _Batch) -> None:
        """Add each gateway's sum of clipped record gradients (Abadi et al. 2016, Algorithm 1)."""
        if not len(batch.y):
            return
        self._losses_backward(batch, batch.mask)
        layers = self._model.used_layers()
        squares = [layer.squared_norms() for layer in layers]
        if not squares:
            return
        if any(part.shape != batch.mask.shape for part in squares):  # clipping would not bound a record's share
            raise RuntimeError(NOT_THE_BATCH)
        norms = functools.reduce(torch.Tensor.add_, squares[1:], squares[0]).sqrt_()
        factors = clip_factors(norms, self._training.privacy.clip_norm).to(gradient.dtype)
        # On a GPU, looking would cost more than selecting.
        if self._device.type != "cpu" or not bool(usable(norms.max())):
            finite = usable(norms)
            for layer in layers:
                layer.select(finite)
        for layer in layers:
            layer.add_sums(gradient, factors)

    def _losses_backward(self, batch: _Batch, weights: torch.Tensor) -> None:
        self._model.differentiate(self._training.loss, batch.x, batch.y, weights.view(-1))

    def _fill_noise(self, noise: LocalNoise, step: int, out: torch.Tensor) -> None:
        if out.device.type == "cpu":
            noise.fill(step, out.numpy())
        else:
            noise.fill_on_device(step, out)

    def _observe(
        self,
        observer: StepObserver,
        gradient: torch.Tensor,
        drawn: torch.Tensor,
        gateways: Sequence[int],
        step: int,
        batch: _Batch,
    ) -> None:
        """Add the noise row by row under an observer; `gradient` ends as released · divisor."""
        divisor = float(self._training.privacy.batch_size) if self._local == "record" else 1.0
        for row, gateway in enumerate(gateways):
            clipped = observer.before_noise(gateway, step, batch.indices[row], gradient[row].clone())
            seen = Release(
                gateway=gateway,
                step=step,
                batch=batch.indices[row],
                clipped=clipped.cpu().numpy(),
                noise=drawn[row].cpu().numpy(),
                divisor=divisor,
            )
            gradient[row] = observer.released(seen, (clipped + drawn[row]) / divisor) * divisor

    def _batches(self, keys: RoundKeys, gateways: Sequence[int], shards: Sequence[Shard]) -> Iterator[_Batch]:
        """Yield the round's batches, gathering records for as many steps at once as the window holds."""
        privacy = self._training.privacy
        samplers = [PoissonSampler(privacy, keys, gateway) for gateway in gateways]
        record_bytes = shards[0].size_bytes // shards[0].num_records
        step_bytes = len(gateways) * 2 * privacy.batch_size * record_bytes
        window = min(privacy.local_steps, max(1, _WINDOW_BYTES // max(1, step_bytes)))
        for first in range(0, privacy.local_steps, window):
            steps = range(first, min(first + window, privacy.local_steps))
            yield from self._gather(
                [sampler.batches(steps, shard.num_records) for sampler, shard in zip(samplers, shards, strict=True)],
                shards,
                len(steps),
            )

    def _gather(
        self, drawn: Sequence[Sequence[npt.NDArray[np.int64]]], shards: Sequence[Shard], num_steps: int
    ) -> Iterator[_Batch]:
        sizes = np.array([[len(batch) for batch in batches] for batches in drawn])  # [G, S]
        widths = sizes.max(0)
        ends = np.cumsum(widths)
        steps, columns = np.repeat(np.arange(num_steps), widths), np.arange(ends[-1])
        present = columns - (ends - widths)[steps] < sizes[:, steps]  # [G, W]: the steps' columns side by side
        index = np.zeros(present.shape, np.int64)
        index[present] = np.concatenate([batch for batches in drawn for batch in batches])
        x, y = (first.new_empty((*present.shape, *first.shape[1:])) for first in (shards[0].x, shards[0].y))
        for row, shard in enumerate(shards):
            chosen = torch.from_numpy(index[row])
            torch.index_select(shard.x, 0, chosen, out=x[row])
            torch.index_select(shard.y, 0, chosen, out=y[row])
        x, y = x.to(self._device), y.to(self._device)
        masks = torch.from_numpy(present.astype(np.float32)).to(self._device)
        for step, (end, width) in enumerate(zip(ends.tolist(), widths.tolist(), strict=True)):
            own = slice(end - width, end)
            yield _Batch(
                x=x[:, own].flatten(0, 1),
                y=y[:, own].flatten(0, 1),
                mask=masks[:, own].contiguous(),
                sizes=sizes[:, step],
                indices=[batches[step] for batches in drawn],
            )


def _names(gateways: Sequence[int]) -> str:
    if len(gateways) == 1:
        return f"gateway {gateways[0]}"
    return f"gateways {gateways[0]}–{gateways[-1]}"
