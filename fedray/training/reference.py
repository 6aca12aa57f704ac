"""The reference trainer: one gateway after the other, per-record gradients through Opacus.

GradSampleModule hooks give per-record gradients and DPOptimizer clips, sums, scales and steps; our subclass replaces its
clipping (public factor, non-finite records selected out) and its noise (keyed). Slow and plain: the law that the fast
trainer is held against.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer

from fedray.algorithms.algorithm import LocalRule
from fedray.data.inputs import on
from fedray.data.shards import Shard
from fedray.errors import FedrayError, GatewayError
from fedray.models.calls import call_model
from fedray.models.layout import Layout
from fedray.privacy.clipping import clip_factors, clip_rows, select_finite
from fedray.privacy.levels import level_of
from fedray.privacy.noise import LocalNoise
from fedray.privacy.sampling import PoissonSampler
from fedray.privacy.streams import RoundKeys, forked_global_rng, torch_seed
from fedray.training.trainer import NOT_THE_BATCH, Float32Array, GatewayShards, LocalTraining, Release, StepObserver


class OpacusTrainer:
    """Trains one gateway after the other in one model.

    Args:
        model: Copied; its initial state is that of every gateway but for the trainable parameters.
        training: How gateways train.
        device: Where.
    """

    def __init__(self, model: torch.nn.Module, training: LocalTraining, device: torch.device) -> None:
        self.observer: StepObserver | None = None
        self._training = training
        self._device = device
        self._local = level_of(training.privacy).local
        model = copy.deepcopy(model).to(device).train()
        self._layout = Layout.of(model)
        # Built once: wrapping again would hook twice.
        self._model = GradSampleModule(model, loss_reduction="sum") if self._local == "record" else model
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._params = [parameter for _, parameter in trainable]
        self._values = model

    def train(
        self, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
    ) -> Float32Array:
        """See `fedray.training.trainer.Trainer.train`."""
        algorithm, sent = self._training.algorithm, torch.from_numpy(np.array(params, np.float32))
        updates = np.empty((len(gateways), len(algorithm.uploads) * len(params)), np.float32)
        for row, gateway in zip(updates, gateways, strict=True):
            try:
                rule = LocalRule(algorithm, 1, sent)
                trained = torch.from_numpy(self._train_gateway(keys, params, gateway, shards[gateway], rule))
                row[:] = rule.uploads(trained.unsqueeze(0))[0].numpy()
            except FedrayError:
                raise
            except (Exception, SystemExit) as error:  # model, loss and data are the user's; they may raise anything
                raise GatewayError(
                    f"gateway {gateway} failed in round {keys.round_index}: {type(error).__name__}: {error}",
                    traceback.format_exc(),
                ) from error
        return updates

    def draw_ahead(self, stop: Event) -> None:
        """Leave it: this trainer draws when it needs to."""

    def _train_gateway(
        self, keys: RoundKeys, params: Float32Array, gateway: int, shard: Shard, rule: LocalRule
    ) -> Float32Array:
        self._layout.load(self._values, params)
        privacy = self._training.privacy
        sampler = PoissonSampler(privacy, keys, gateway)
        noise = LocalNoise(privacy, keys, [gateway])
        seed_key = keys.key("model draws", gateway)
        shard = Shard(x=on(shard.x, self._device), y=shard.y.to(self._device))
        optimizer = self._new_optimizer()
        with forked_global_rng(torch_seed(seed_key, "round")), warnings.catch_warnings():
            # Torch remarks at each first backward that records need no gradient themselves: true, and meant so.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            for step in range(privacy.local_steps):
                torch.manual_seed(torch_seed(seed_key, "step", step))
                batch = sampler.batch(step, shard.num_records)
                if self._local == "plain" and len(batch) == 0:
                    continue  # nothing to learn from; the private levels still release noise
                optimizer.zero_grad(set_to_none=True)
                if len(batch):
                    chosen = shard.records(torch.from_numpy(batch).to(self._device))
                    losses = self._training.loss(call_model(self._model, chosen.x), chosen.y)
                    losses.sum().backward()  # type: ignore[no-untyped-call]  # torch lacks the annotation
                self._step(optimizer, gateway, step, batch, noise, rule)
        return self._layout.flatten(self._values)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        kind = torch.optim.Adam if self._training.optimizer == "adam" else torch.optim.SGD
        optimizer: torch.optim.Optimizer = kind(self._params, lr=self._training.lr)
        return optimizer if self._local != "record" else KeyedDPOptimizer(optimizer, self._training)

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        gateway: int,
        step: int,
        batch: npt.NDArray[np.int64],
        noise: LocalNoise,
        rule: LocalRule,
    ) -> None:
        privacy = self._training.privacy
        if self._local == "plain":
            for parameter in self._params:
                if parameter.grad is not None:
                    parameter.grad /= len(batch)
            if rule.changes_gradients:
                _unflatten(self._ruled(rule, _flat([p.grad for p in self._params], self._params)), self._params)
            optimizer.step()
            return
        draw = np.empty((1, self._layout.num_params), np.float32)
        noise.fill(step, draw)
        divisor = privacy.batch_size if self._local == "record" else 1

        def release(clipped: torch.Tensor) -> torch.Tensor:
            if self.observer is not None:
                clipped = self.observer.before_noise(gateway, step, batch, clipped)
            gradient = (clipped + torch.from_numpy(draw[0]).to(clipped.device)) / divisor
            if self.observer is not None:
                seen = Release(
                    gateway=gateway,
                    step=step,
                    batch=batch,
                    clipped=clipped.cpu().numpy(),
                    noise=draw[0],
                    divisor=divisor,
                )
                gradient = self.observer.released(seen, gradient)
            return self._ruled(rule, gradient) if rule.changes_gradients else gradient

        if isinstance(optimizer, KeyedDPOptimizer):
            optimizer.release, optimizer.num_records = release, len(batch)
        else:
            mean = _flat([p.grad for p in self._params], self._params) / privacy.batch_size
            _unflatten(release(clip_rows(mean.unsqueeze(0), privacy.clip_norm, privacy.clipping)[0]), self._params)
        optimizer.step()

    def _ruled(self, rule: LocalRule, gradient: torch.Tensor) -> torch.Tensor:
        """Return the algorithm's gradient `[P]` for the optimizer."""
        params = torch.cat([parameter.detach().flatten() for parameter in self._params])
        return rule.gradient(gradient.cpu().unsqueeze(0), params.cpu().unsqueeze(0))[0].to(gradient.device)


class KeyedDPOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus is untyped
    """Opacus' DPOptimizer with a public clipping factor, non-finite records selected out, and keyed noise.

    `release` maps the flat clipped sum `[P]` to the flat released gradient `[P]`; the trainer sets it before each step, and
    `num_records`, how many records the batch holds.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, training: LocalTraining) -> None:
        privacy = training.privacy
        super().__init__(
            optimizer,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.clip_norm,
            expected_batch_size=privacy.batch_size,
            loss_reduction="mean",
        )
        self.release: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.num_records = 0
        self._rule = privacy.clipping

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip, sum, add noise, divide by the public B; an empty batch is a step like any other."""
        assert self.release is not None, "the trainer sets it before each step"
        self.clip_and_accumulate()
        _unflatten(self.release(_flat([p.summed_grad for p in self.params], self.params)), self.params)
        return True

    def clip_and_accumulate(self) -> None:
        """Sum the clipped per-record gradients into `summed_grad`."""
        samples = [p.grad_sample for p in self.params]
        used = [sample for sample in samples if sample is not None]
        if not used:  # an empty batch
            for p in self.params:
                p.summed_grad = torch.zeros_like(p)
            return
        if any(len(sample) != self.num_records for sample in used):  # clipping would not bound a record's share
            raise RuntimeError(NOT_THE_BATCH)
        per_param = [torch.linalg.vector_norm(sample.flatten(1), dim=1, dtype=torch.float64) for sample in used]
        norms = torch.stack(per_param, dim=1).norm(2, dim=1)
        factors = clip_factors(norms, self.max_grad_norm, rule=self._rule)
        for p, sample in zip(self.params, samples, strict=True):
            if sample is None:  # a parameter that this forward pass did not use
                p.summed_grad = torch.zeros_like(p)
            else:
                p.summed_grad = torch.einsum("i,i...", factors, select_finite(sample, norms))


def _flat(values: Sequence[torch.Tensor | None], params: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if value is None else value.flatten()
            for value, p in zip(values, params, strict=True)
        ]
    )


def _unflatten(flat: torch.Tensor, params: Sequence[Any]) -> None:
    start = 0
    for parameter in params:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
