"""Small models, shards and observed local training for the proofs; knows no statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedray import Orchestrator, RunConfig
from fedray.data.shards import RecordRules, Shard
from fedray.models.layout import Layout
from fedray.pool import worker
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys, first_round_key, new_root_key, next_round_key
from fedray.reports.callback import Callback
from fedray.tasks.own_loss import Loss, OwnLoss
from fedray.training import engines
from fedray.training.trainer import LocalTraining, Release

Float32Array = npt.NDArray[np.float32]

NUM_FEATURES = 5
NUM_OUTPUTS = 3


def spec_of(level: str, **changes: Any) -> PrivacySpec:
    """Return public constants in which sigma, C, B and q all differ from 1."""
    constants: dict[str, Any] = {
        "noise_level": level,
        "noise_multiplier": 0.7,
        "clip_norm": 2.0,
        "delta": 1e-5,
        "batch_size": 8,
        "sample_rate": 0.5,
        "local_steps": 3,
        "expected_cohort": 4.0,
    }
    return PrivacySpec(**{**constants, **changes})


_fresh = [0]


def repetition(number: int) -> None:
    """Give all keys fresh seeds from here on; 0, the default, are the fixed seeds of the suite."""
    _fresh[0] = number


def fresh(seed: int) -> int:
    """Return a seed of this repetition."""
    return seed + 10_000 * _fresh[0]


def keys_of(seed: int, round_index: int = 1, attempt: int = 0) -> RoundKeys:
    """Return the keys of a round of the run with this seed."""
    key = first_round_key(new_root_key(fresh(seed)))
    for _ in range(round_index):
        key = next_round_key(key)
    return RoundKeys(round_key=key, round_index=round_index, attempt=attempt)


def product_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return ⟨output, target⟩ of each record: a linear model's gradient is then the outer product of target and x."""
    return (output * target).sum(dim=1)


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(NUM_FEATURES, NUM_FEATURES)
        self.outer = nn.Linear(NUM_FEATURES, NUM_FEATURES)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(NUM_FEATURES, NUM_OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores."""
        return cast(torch.Tensor, self.head(torch.relu(self.outer(torch.relu(self.inner(x))))))


def model_of(kind: str) -> nn.Module:
    """Return a model with fixed initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if kind == "linear":
            return nn.Linear(NUM_FEATURES, NUM_OUTPUTS)
        if kind == "mlp":
            return nn.Sequential(nn.Linear(NUM_FEATURES, 6), nn.Tanh(), nn.Linear(6, NUM_OUTPUTS))
        if kind == "frozen":
            model = nn.Sequential(nn.Linear(NUM_FEATURES, 6), nn.Tanh(), nn.Linear(6, NUM_OUTPUTS))
            model[0].weight.requires_grad_(False)
            return model
        if kind == "tied":
            return Tied()
        if kind == "conv":
            return nn.Sequential(
                nn.Unflatten(1, (1, NUM_FEATURES)),
                nn.Conv1d(1, 4, 3, padding=1),
                nn.GroupNorm(2, 4),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(4 * NUM_FEATURES, NUM_OUTPUTS),
            )
        raise ValueError(kind)


MODELS = ("linear", "mlp", "frozen", "tied", "conv")


def wide_model(num_params: int) -> nn.Module:
    """Return a linear model with exactly this many parameters (a multiple of 6)."""
    return nn.Linear(NUM_FEATURES, num_params // (NUM_FEATURES + 1))


def training_of(spec: PrivacySpec, loss: Loss = product_loss, lr: float = 0.1) -> LocalTraining:
    """Return plain SGD, whose update is −lr times the sum of the released gradients."""
    return LocalTraining(privacy=spec, optimizer="sgd", lr=lr, loss=loss)


def shard_of(x: Any, y: Any) -> Shard:
    """Return an unchecked shard, so that it may hold NaN and be empty."""
    return Shard(x=torch.as_tensor(x, dtype=torch.float32), y=torch.as_tensor(y, dtype=torch.float32))


def random_shard(num_records: int, seed: int = 0, num_outputs: int = NUM_OUTPUTS, scale: float = 1.0) -> Shard:
    """Return a shard of normal records for `product_loss`."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(num_records, NUM_FEATURES)), rng.normal(size=(num_records, num_outputs))
    return shard_of(scale * x, y)


def without_last(shard: Shard) -> Shard:
    """Return the neighbour that lacks the last record."""
    return Shard(x=shard.x[:-1], y=shard.y[:-1])


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an observer saw of one local step: the release and the gradient that the optimizer was to get."""

    release: Release
    gradient: Float32Array

    @property
    def noise(self) -> Float32Array:
        """What was really added: the released sum minus the clipped sum, whatever the trainer says it drew."""
        return self.gradient * np.float32(self.release.divisor) - self.release.clipped


Steps = dict[tuple[int, int], Step]


@dataclass
class Recorder:
    """Records local steps; with `replay`, the optimizer gets the gradients of an earlier recording."""

    replay: Mapping[tuple[int, int], Step] | None = None
    steps: Steps = field(default_factory=dict)

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        """Leave the clipped value alone."""
        return clipped

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        """Record the step."""
        where = (release.gateway, release.step)
        assert where not in self.steps, "a step was released twice"
        copied = replace(release, clipped=release.clipped.copy(), noise=release.noise.copy())
        self.steps[where] = Step(release=copied, gradient=gradient.detach().cpu().numpy().copy())
        if self.replay is None:
            return gradient
        return torch.from_numpy(self.replay[where].gradient.copy()).to(gradient.device)


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Local training as an observer saw it."""

    steps: Steps
    updates: Float32Array

    def noise(self) -> Float32Array:
        """Return the noise of all steps, `[steps, P]`."""
        return np.stack([step.noise for step in self.steps.values()])


def observe(
    engine: str,
    model: nn.Module,
    training: LocalTraining,
    shards: Mapping[int, Shard],
    keys: RoundKeys,
    *,
    gateways: Sequence[int] | None = None,
    replay: Steps | None = None,
) -> Observed:
    """Train gateways for one round with a real trainer and record every local step."""
    trainer = engines.new_trainer(cast(engines.Engine, engine), model, training, torch.device("cpu"))
    recorder = Recorder(replay=replay)
    trainer.observer = recorder
    params = Layout.of(model).flatten(model)
    updates = trainer.train(keys, params, sorted(shards) if gateways is None else gateways, shards)
    return Observed(steps=recorder.steps, updates=updates)


def observe_nothing(
    engine: str, model: nn.Module, training: LocalTraining, shards: Mapping[int, Shard], keys: RoundKeys
) -> npt.NDArray[np.float64]:
    """Train gateways for one round as a run does, without an observer; return the updates `[G·P]`."""
    trainer = engines.new_trainer(cast(engines.Engine, engine), model, training, torch.device("cpu"))
    updates = trainer.train(keys, Layout.of(model).flatten(model), sorted(shards), shards)
    return updates.astype(np.float64).ravel()


def worker_of(engine: str, model: nn.Module, training: LocalTraining, shards: Sequence[Shard]) -> worker.Worker:
    """Return a real worker over these shards."""
    pairs = [(shard.x.numpy(), shard.y.numpy()) for shard in shards]
    rules = RecordRules.of(np.zeros((1, NUM_FEATURES), np.float32), OwnLoss(product_loss))
    setup = worker.WorkerSetup(
        model=model, training=training, shards=pairs, rules=rules, engine=cast(engines.Engine, engine)
    )
    return worker.Worker(setup, torch.device("cpu"))


def clipped_sum(
    model: nn.Module, loss: Loss, shard: Shard, batch: Sequence[int], clip_norm: float
) -> npt.NDArray[np.float64]:
    """Return the sum of clipped gradients by plain autograd in float64, one record at a time."""
    import copy

    model = copy.deepcopy(model).double().train()
    params = [p for p in model.parameters() if p.requires_grad]
    total = np.zeros(sum(p.numel() for p in params))
    for index in batch:
        value = loss(model(shard.x[index : index + 1].double()), shard.y[index : index + 1].double()).sum()
        gradients = torch.autograd.grad(value, params, allow_unused=True)
        flat = torch.cat(
            [
                torch.zeros(p.numel()).double() if g is None else g.flatten()
                for g, p in zip(gradients, params, strict=True)
            ]
        ).numpy()
        norm = float(np.linalg.norm(flat))
        total += flat * min(1.0, clip_norm / norm) if norm > 0 else flat
    return total


def data_free_run(num_params: int, callbacks: Sequence[Callback] = (), **settings: Any) -> Orchestrator:
    """Return a run of two gateways with three local steps, B = 25 and sigma·C = .7 · 20, in which data play no part."""
    shard = random_shard(2, num_outputs=num_params // (NUM_FEATURES + 1))
    fixed: dict[str, Any] = {"pool": "inline", "device": "cpu"}
    if "resume" not in settings:
        fixed |= {
            "local_steps": 3,
            "batch_size": 25,
            "samples_per_gateway": 12_500,
            "noise_multiplier": 0.7,
            "clip_norm": 20.0,
            "optimizer": "sgd",
        }
    return Orchestrator(
        [(shard.x.numpy(), shard.y.numpy())] * 2,
        model=lambda: wide_model(num_params),
        loss=product_loss,
        config=RunConfig().resolve(**(fixed | settings)),
        callbacks=callbacks,
    )
