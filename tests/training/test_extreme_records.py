"""Records of any size stay within C, and move nobody else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedray.data.shards import Shard
from fedray.models.layout import Layout
from fedray.privacy.spec import NoiseLevelName
from fedray.privacy.streams import RoundKeys
from fedray.training.engines import Engine, new_trainer
from tests.training.stacked_models import CLASSES, CPU, Recorder, shards_of, training_of


def _faint_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output * 1e-24).sum(1)


def test_clipping_holds_where_a_tiny_gradient_meets_a_huge_input() -> None:
    """1e-24 · 1e18 is far above C here, though float32 cannot hold the square of the first."""
    model, training = nn.Linear(6, CLASSES, bias=False), training_of("sample")
    training = replace(training, loss=_faint_loss, privacy=replace(training.privacy, clip_norm=1e-9, sample_rate=1.0))
    shards, recorder = [Shard(x=torch.full((1, 6), 1e17), y=torch.zeros(1, dtype=torch.int64))], Recorder()
    trainer = new_trainer("stacked", model, training, CPU)
    trainer.observer = recorder
    trainer.train(RoundKeys(round_key=bytes(32), round_index=1), Layout.of(model).flatten(model), [0], shards)
    clipped = np.linalg.norm(recorder.releases[0, 0].clipped.astype(np.float64))
    assert 0.99e-9 < clipped <= 1e-9 * (1 + 1e-5)


def product_losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return losses whose gradient at the outputs is the target: of any size."""
    return (output * target).sum(1)


@pytest.mark.parametrize("engine", ["sequence", "alone"])
@pytest.mark.parametrize("clip_norm", [1.0, 1e-4, 1e-10, 1e-15])
def test_clipping_holds_where_float32_would_round_a_factor_up(engine: Engine, clip_norm: float) -> None:
    """A factor of 1e-41 has few digits, and an input of 1e35 brings what they lack back."""
    model, training = nn.Sequential(nn.Linear(6, CLASSES, bias=False)), training_of("sample")
    privacy = replace(training.privacy, clip_norm=clip_norm, sample_rate=1.0, local_steps=1)
    training = replace(training, loss=product_losses, privacy=privacy)
    longest = 0.0
    for exponent in range(10, 39):
        for size in (1e-22, 1e-20):
            random = torch.Generator().manual_seed(exponent)
            x = torch.randn(1, 6, generator=random) * 10.0**exponent
            shards = [Shard(x=x.clamp(-3e38, 3e38), y=size * torch.rand(1, CLASSES, generator=random))]
            recorder, trainer = Recorder(), new_trainer(engine, model, training, CPU)
            trainer.observer = recorder
            trainer.train(RoundKeys(round_key=bytes(32), round_index=1), Layout.of(model).flatten(model), [0], shards)
            longest = max(longest, float(np.linalg.norm(recorder.releases[0, 0].clipped.astype(np.float64))))
    assert 0.99 * clip_norm < longest <= clip_norm * (1 + 1e-5)


@pytest.mark.parametrize("level", ["batch", "gateway"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_record_that_is_no_number_moves_no_other_gateways_update_by_a_bit(
    level: NoiseLevelName, value: float
) -> None:
    training = training_of(level)
    training = replace(training, privacy=replace(training.privacy, sample_rate=0.5, local_steps=6))
    for seed, width in ((1, 8), (2, 64), (3, 300)):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, CLASSES))
        updates = []
        for size in (1.0, value):
            shards = shards_of((6,), tokens=False)
            shards[1].x[-1] *= size
            trainer = new_trainer("stacked", model, training, CPU)
            keys = RoundKeys(round_key=bytes(32), round_index=1)
            updates.append(trainer.train(keys, Layout.of(model).flatten(model), [0, 1, 2], shards))
        for gateway in (0, 2):
            np.testing.assert_array_equal(updates[0][gateway], updates[1][gateway])


@pytest.mark.parametrize("value", [3e18, 1e10, float("nan"), float("inf")])
def test_a_record_of_any_size_moves_no_other_gateways_sum_by_a_bit(value: float) -> None:
    torch.manual_seed(1)
    model, training = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)), training_of("sample")
    training = replace(training, privacy=replace(training.privacy, sample_rate=1.0))
    sums = []
    for size in (1.0, value):
        shards, recorder = shards_of((6,), tokens=False), Recorder()
        shards[1].x[-1] *= size
        trainer = new_trainer("stacked", model, training, CPU)
        trainer.observer = recorder
        trainer.train(RoundKeys(round_key=bytes(32), round_index=1), Layout.of(model).flatten(model), [0, 1, 2], shards)
        sums.append({gateway: recorder.releases[gateway, 0].clipped for gateway in range(3)})
    assert not np.array_equal(sums[0][1], sums[1][1])
    for gateway in (0, 2):
        np.testing.assert_array_equal(sums[0][gateway], sums[1][gateway])
