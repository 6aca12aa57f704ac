"""The fast trainer: all gateways of a group in one batched step.

The parameters of G gateways are one `[G, P]` matrix. A step asks for each gateway's sum of clipped record gradients
(`RecordGradients`: a sequence of proven layers, or a program that saw one record) and adds it onto the step's noise, which
is already in the gradient matrix. Groups are cut so that a step's matrices stay in the processor's cache and under the
memory limit; the cut changes results by rounding alone (padding differs; within 1e-5).
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager
from threading import Event

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.algorithm import LocalRule
from fedray.data.shards import Shard
from fedray.errors import FedrayError, GatewayError
from fedray.privacy.clipping import clip_rows
from fedray.privacy.levels import level_of
from fedray.privacy.streams import RoundKeys
from fedray.training.draws import Batch, RoundDraws
from fedray.training.record_gradients import RecordGradients
from fedray.training.row_optimizers import new_row_optimizer
from fedray.training.trainer import Float32Array, GatewayShards, LocalTraining, Release, StepObserver

_MATRICES = 5  # parameters, gradients, Adam's two moments, a layer's sums
_AHEAD_BYTES = 8 * 2**20  # of noise drawn ahead of its round


class StackedTrainer:
    """Trains groups of gateways in one batched step.

    Args:
        gradients: Of the model and loss.
        training: How gateways train.
        device: Where.
        memory_limit: Bytes that a group's matrices and activations may take.
    """

    def __init__(
        self, gradients: RecordGradients, training: LocalTraining, device: torch.device, memory_limit: int = 2**31
    ) -> None:
        self.observer: StepObserver | None = None
        self._training = training
        self._algorithm = training.algorithm
        self._device = device
        self._local = level_of(training.privacy).local
        self._divisor = float(training.privacy.batch_size) if self._local == "record" else 1.0
        self._gradients = gradients
        self._memory_limit = memory_limit
        self._bytes_per_record: int | None = None
        self._first: RoundDraws | None = None  # of the first group of the last round
        self._ahead: RoundDraws | None = None
        self._ahead_memory = torch.empty(0)

    def train(
        self, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
    ) -> Float32Array:
        """See `fedray.training.trainer.Trainer.train`."""
        updates = np.empty((len(gateways), len(self._algorithm.uploads) * len(params)), np.float32)
        start = 0
        while start < len(gateways):
            first = shards[gateways[start]]
            group = gateways[start : start + 1]
            try:
                group = gateways[start : start + self._group_size(len(params), first)]
                draws = self._draws(keys, group, shards)
                with self._mode():
                    updates[start : start + len(group)] = self._train_group(params, group, draws)
                self._first = draws if start == 0 else self._first
            except FedrayError:
                raise
            except (Exception, SystemExit) as error:  # model, loss and data are the user's; they may raise anything
                raise GatewayError(
                    f"{_names(group)} failed in round {keys.round_index}: {type(error).__name__}: {error}",
                    traceback.format_exc(),
                ) from error
            start += len(group)
        return updates

    def _group_size(self, num_params: int, shard: Shard) -> int:
        per_gateway = matrices = 4 * _MATRICES * num_params
        # For batches half as large again as expected.
        per_gateway += int(1.5 * self._training.privacy.batch_size * self._record_bytes(shard))
        size = self._memory_limit // per_gateway
        if self._device.type == "cpu":
            # Small enough for the cache, but not so small that the calls cost more than the work.
            cache_bytes = self._gradients.cache_bytes
            fewest = self._gradients.fewest_together if matrices <= cache_bytes else 1
            size = min(size, max(cache_bytes // per_gateway, fewest))
        return max(1, size)

    def _record_bytes(self, shard: Shard) -> int:
        if self._bytes_per_record is None:
            self._bytes_per_record = self._gradients.bytes_per_record(shard)
        return self._bytes_per_record

    def draw_ahead(self, stop: Event) -> None:
        """See `fedray.training.trainer.Trainer.draw_ahead`."""
        if self._first is None or self._device.type != "cpu":
            return
        following, rows, num_params = self._first.following(), len(self._first.shards), self._gradients.num_params
        steps = 0 if self._local == "plain" else min(_AHEAD_BYTES, self._memory_limit // 8) // (4 * rows * num_params)
        size = min(steps, self._training.privacy.local_steps) * rows * num_params
        with self._mode():
            if len(self._ahead_memory) < size:  # kept: fresh memory would cost a page fault every 4 KB
                self._ahead_memory = torch.empty(size)
            following.draw_ahead(self._ahead_memory[:size].view(-1, rows, num_params), stop)
        self._ahead = following

    def _draws(self, keys: RoundKeys, gateways: Sequence[int], shards: GatewayShards) -> RoundDraws:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.serve(keys, gateways):
            return ahead
        return RoundDraws(
            self._training.privacy, self._device, keys, gateways, [shards[gateway] for gateway in gateways]
        )

    def _mode(self) -> AbstractContextManager[None]:
        # Without the book-keeping that autograd wants a step's calls take a sixth less time.
        return torch.inference_mode() if self.observer is None else torch.no_grad()

    def _train_group(self, params: Float32Array, gateways: Sequence[int], draws: RoundDraws) -> Float32Array:
        sent = torch.from_numpy(np.array(params, np.float32)).to(self._device)  # a copy: it may be a shared view
        values = sent.repeat(len(gateways), 1)
        self._gradients.bind(values, draws.identity)
        optimizer = new_row_optimizer(self._training.optimizer, values, self._training.lr, self._divisor)
        rule = LocalRule(self._algorithm, len(gateways), sent)
        memory = torch.empty_like(values)
        for step, batch in enumerate(draws.batches()):
            gradient = self._release(memory, gateways, step, batch, draws)
            if rule.changes_gradients:
                gradient = rule.gradient(gradient / self._divisor, values) * self._divisor
            if self._local != "plain" or batch.sizes.all():
                optimizer.step(gradient)
            elif batch.sizes.any():
                optimizer.step(gradient, torch.from_numpy(np.flatnonzero(batch.sizes)).to(self._device))
        return rule.uploads(values).cpu().numpy()

    def _release(
        self, memory: torch.Tensor, gateways: Sequence[int], step: int, batch: Batch, draws: RoundDraws
    ) -> torch.Tensor:
        """Return the step's gradients `[G, P]` with their noise, times the optimizer's divisor; in `memory` or not."""
        if self._local == "plain":
            self._add_gradients(memory.zero_(), batch, step, 1.0 / np.maximum(batch.sizes, 1))
            return memory
        if self._local == "record" and self.observer is None:
            gradient = draws.noise(step, memory)
            self._add_clipped_records(gradient, batch, step)
            return gradient
        gradient = memory.zero_()
        if self._local == "record":
            self._add_clipped_records(gradient, batch, step)
        else:
            self._add_gradients(gradient, batch, step, np.full(len(gateways), 1.0 / self._training.privacy.batch_size))
            gradient.copy_(clip_rows(gradient, self._training.privacy.clip_norm, self._training.privacy.clipping))
        drawn = draws.noise(step, torch.empty_like(gradient))
        if self.observer is None:
            gradient += drawn
        else:
            self._observe(self.observer, gradient, drawn, gateways, step, batch)
        return gradient

    def _add_gradients(self, gradient: torch.Tensor, batch: Batch, step: int, scales: npt.NDArray[np.float64]) -> None:
        """Set `gradient`, which is zero, to each gateway's gradient sum times its scale."""
        if batch.mask.shape[1]:
            self._gradients.add_weighted(gradient, batch, step, scales)

    def _add_clipped_records(self, gradient: torch.Tensor, batch: Batch, step: int) -> None:
        """Add each gateway's sum of clipped record gradients (Abadi et al. 2016, Algorithm 1)."""
        if batch.mask.shape[1]:
            privacy = self._training.privacy
            self._gradients.add_clipped(gradient, batch, step, privacy.clip_norm, privacy.clipping)

    def _observe(
        self,
        observer: StepObserver,
        gradient: torch.Tensor,
        drawn: torch.Tensor,
        gateways: Sequence[int],
        step: int,
        batch: Batch,
    ) -> None:
        """Add the noise row by row under an observer; `gradient` ends as released · divisor."""
        divisor = self._divisor
        for row, gateway in enumerate(gateways):
            indices = batch.indices(row)
            clipped = observer.before_noise(gateway, step, indices, gradient[row].clone())
            seen = Release(
                gateway=gateway,
                step=step,
                batch=indices,
                clipped=clipped.cpu().numpy(),
                noise=drawn[row].cpu().numpy(),
                divisor=divisor,
            )
            gradient[row] = observer.released(seen, (clipped + drawn[row]) / divisor) * divisor


def _names(gateways: Sequence[int]) -> str:
    if len(gateways) == 1:
        return f"gateway {gateways[0]}"
    return f"gateways {gateways[0]}–{gateways[-1]}"
