"""Mutants around a training step: its divisor, the order of clipping and noise, and who is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from fedray.privacy import clipping
from fedray.privacy.sampling import PoissonSampler
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys
from fedray.training.stacked import StackedTrainer
from fedray.training.trainer import Float32Array, GatewayShards, LocalTraining, Release, StepObserver, Trainer
from tests.privacy.mutants.patching import Patch, replace_everywhere

Mutation = Callable[[Release, torch.Tensor], tuple[Release, torch.Tensor]]


class _Steered:
    """A trainer whose releases are mutated before the test's observer sees them."""

    def __init__(self, inner: Trainer, mutation: Mutation) -> None:
        self.observer: StepObserver | None = None
        self._inner = inner
        self._mutation = mutation
        inner.observer = self

    def train(
        self, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
    ) -> Float32Array:
        return self._inner.train(keys, params, gateways, shards)

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        return clipped if self.observer is None else self.observer.before_noise(gateway, step, batch, clipped)

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        release, gradient = self._mutation(release, gradient)
        return gradient if self.observer is None else self.observer.released(release, gradient)


def _steer(patch: Patch, mutation: Mutation) -> None:
    from fedray.training import engines

    new_trainer = engines.new_trainer
    replace_everywhere(patch, new_trainer, lambda *args, **named: _Steered(new_trainer(*args, **named), mutation))


def divided_by_realised_size(patch: Patch, engine: str) -> None:
    """The noisy sum is divided by the size of the batch that was drawn."""

    def mutation(release: Release, gradient: torch.Tensor) -> tuple[Release, torch.Tensor]:
        divisor = max(1, len(release.batch))
        return replace(release, divisor=divisor), gradient * (release.divisor / divisor)

    _steer(patch, mutation)


def noise_before_clipping(patch: Patch, engine: str) -> None:
    """The noisy sum is clipped again."""

    def mutation(release: Release, gradient: torch.Tensor) -> tuple[Release, torch.Tensor]:
        return release, clipping.clip_rows(gradient.unsqueeze(0) * release.divisor, 2.0)[0] / release.divisor

    _steer(patch, mutation)


class _PrivateDivisor:
    """A trainer that derives the divisor from the number of records, as Opacus' make_private does."""

    def __init__(self, new_trainer: Any, args: Sequence[Any]) -> None:
        self.observer: StepObserver | None = None
        self._new_trainer, self._args = new_trainer, args

    def train(
        self, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
    ) -> Float32Array:
        rows = []
        engine, model, training, device = self._args[:4]
        for gateway in gateways:
            privacy: PrivacySpec = training.privacy
            expected = max(1, round(privacy.sample_rate * shards[gateway].num_records))
            mutated: LocalTraining = replace(training, privacy=replace(privacy, batch_size=expected))
            trainer = self._new_trainer(engine, model, mutated, device)
            trainer.observer = self.observer
            rows.append(trainer.train(keys, params, [gateway], shards))
        return cast(Float32Array, np.concatenate(rows))


def divisor_from_private_size(patch: Patch, engine: str) -> None:
    """B is q·N of the gateway's own N."""
    from fedray.training import engines

    new_trainer = engines.new_trainer
    replace_everywhere(patch, new_trainer, lambda *args, **_: _PrivateDivisor(new_trainer, args))


def empty_batches_skipped(patch: Patch, engine: str) -> None:
    """An empty batch is no step."""
    if engine in ("stacked", "alone"):
        observe = StackedTrainer._observe

        def mutated_observe(self: Any, observer: Any, gradient: torch.Tensor, *args: Any) -> None:
            if args[-1].sizes.all():
                observe(self, observer, gradient, *args)
            else:  # the proof trains one gateway at a time
                gradient.zero_()

        patch.setattr(StackedTrainer, "_observe", mutated_observe)
        return
    assert engine == "opacus", f"write this mutant for engine {engine}"
    from fedray.training.reference import OpacusTrainer

    step = OpacusTrainer._step

    def mutated(self: OpacusTrainer, optimizer: Any, gateway: int, index: int, batch: Any, *others: Any) -> None:
        if len(batch):
            step(self, optimizer, gateway, index, batch, *others)

    patch.setattr(OpacusTrainer, "_step", mutated)


# --- sampler -----------------------------------------------------------------------------------------------------------


def sampled_without_replacement(patch: Patch, engine: str) -> None:
    """Batches have a fixed size but are booked as Poisson."""

    def mutated(self: PoissonSampler, step: int, num_records: int) -> npt.NDArray[np.int64]:
        self._stream.seek(step)
        words = np.empty(num_records, np.uint32)
        self._stream.fill_bytes(words.view(np.uint8))
        return np.sort(np.argsort(words)[: round(self._rate * num_records)])

    patch.setattr(PoissonSampler, "batch", mutated)

    def mutated_steps(self: PoissonSampler, steps: range, num_records: int) -> Any:
        batches = [mutated(self, step, num_records) for step in steps]
        return np.concatenate(batches), np.array([len(batch) for batch in batches])

    patch.setattr(PoissonSampler, "batches", mutated_steps)


def sampled_at_double_rate(patch: Patch, engine: str) -> None:
    """The sampler draws at 2q, the accountant books q."""
    init = PoissonSampler.__init__

    def mutated(self: PoissonSampler, spec: PrivacySpec, keys: RoundKeys, gateway: int) -> None:
        init(self, replace(spec, sample_rate=min(1.0, 2 * spec.sample_rate)), keys, gateway)

    patch.setattr(PoissonSampler, "__init__", mutated)
