"""What is drawn ahead of its round is what would be drawn in it, and serves no other round."""

from __future__ import annotations

from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch
from torch import nn

from fedray.data.shards import Shard
from fedray.models.layout import Layout
from fedray.privacy.spec import NoiseLevelName
from fedray.privacy.streams import RoundKeys
from fedray.tasks.classification import cross_entropy
from fedray.training.draws import RoundDraws
from fedray.training.engines import new_trainer
from fedray.training.trainer import LocalTraining
from tests.privacy.worlds import spec_of

CPU = torch.device("cpu")
KEYS = RoundKeys(round_key=bytes(range(32)), round_index=3)
SIZES = (40, 9, 23)


def _model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def _shards() -> list[Shard]:
    random = torch.Generator().manual_seed(5)
    return [
        Shard(x=torch.randn(size, 6, generator=random), y=torch.randint(4, (size,), generator=random)) for size in SIZES
    ]


def _training(level: NoiseLevelName) -> LocalTraining:
    return LocalTraining(privacy=replace(spec_of(level), local_steps=5), optimizer="adam", lr=0.02, loss=cross_entropy)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("level", ["none", "sample", "batch", "gateway"])
def test_updates_are_the_same_bits_with_draws_made_ahead(level: NoiseLevelName, stopped: bool) -> None:
    """Whether all, or nothing but the batches, was drawn when the round came."""
    model, stop = _model(), Event()
    params = Layout.of(model).flatten(model)
    ahead, plain = (new_trainer("stacked", model, _training(level), CPU) for _ in range(2))
    ahead.train(KEYS, params, [0, 1, 2], _shards())
    if stopped:
        stop.set()
    ahead.draw_ahead(stop)
    found = ahead.train(KEYS.following(), params, [0, 1, 2], _shards())
    assert found.tobytes() == plain.train(KEYS.following(), params, [0, 1, 2], _shards()).tobytes()


@pytest.mark.parametrize(
    ("keys", "gateways"),
    [
        (replace(KEYS.following(), attempt=1), [0, 1, 2]),
        (KEYS, [0, 1, 2]),
        (KEYS.following().following(), [0, 1, 2]),
        (replace(KEYS.following(), round_key=bytes(32)), [0, 1, 2]),
        (KEYS.following(), [2, 1, 0]),
        (KEYS.following(), [0, 1]),
    ],
)
def test_draws_made_ahead_serve_no_other_round_attempt_or_group(keys: RoundKeys, gateways: list[int]) -> None:
    """Noise that was drawn for one attempt never meets the parameters of another."""
    model = _model()
    params = Layout.of(model).flatten(model)
    ahead, plain = (new_trainer("stacked", model, _training("sample"), CPU) for _ in range(2))
    ahead.train(KEYS, params, [0, 1, 2], _shards())
    ahead.draw_ahead(Event())
    found = ahead.train(keys, params, gateways, _shards())
    assert found.tobytes() == plain.train(keys, params, gateways, _shards()).tobytes()


def test_draws_made_ahead_are_used_once() -> None:
    """A round that is repeated draws anew, the same bits."""
    model = _model()
    params = Layout.of(model).flatten(model)
    trainer = new_trainer("stacked", model, _training("sample"), CPU)
    trainer.train(KEYS, params, [0, 1, 2], _shards())
    trainer.draw_ahead(Event())
    twice = [trainer.train(KEYS.following(), params, [0, 1, 2], _shards()).tobytes() for _ in range(2)]
    assert twice[0] == twice[1]


def test_noise_that_was_drawn_ahead_is_not_drawn_again() -> None:
    """The first steps come from the memory, the others from the stream."""
    spec, shards = _training("sample").privacy, _shards()
    ahead, plain = (RoundDraws(spec, CPU, KEYS, [0, 1, 2], shards) for _ in range(2))
    memory, spare = torch.empty(2, 3, 11), torch.empty(3, 11)
    ahead.draw_ahead(memory, Event())
    for step in range(4):
        expected = plain.noise(step, torch.empty(3, 11))
        if step < 2:
            assert torch.equal(memory[step], expected)
            memory[step].fill_(7.0)
            expected.fill_(7.0)
        assert torch.equal(ahead.noise(step, spare), expected)


def test_batches_that_were_drawn_ahead_are_all_there() -> None:
    spec, shards = _training("sample").privacy, _shards()
    ahead, plain = (RoundDraws(spec, CPU, KEYS, [0, 1, 2], shards) for _ in range(2))
    ahead.draw_ahead(torch.empty(0, 3, 11), Event())
    found, expected = list(ahead.batches()), list(plain.batches())
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)
        assert torch.equal(one.mask, other.mask)
        assert [one.indices(row).tolist() for row in range(3)] == [other.indices(row).tolist() for row in range(3)]
        assert [len(one.indices(row)) for row in range(3)] == one.mask.sum(1).tolist()


def test_batches_hold_the_records_that_they_name() -> None:
    spec, shards = _training("sample").privacy, _shards()
    for batch in RoundDraws(spec, CPU, KEYS, [0, 1, 2], shards).batches():
        x, y = batch.x.view(3, -1, 6), batch.y.view(3, -1)
        for row, shard in enumerate(shards):
            indices = batch.indices(row)
            np.testing.assert_array_equal(x[row, : len(indices)], shard.x[torch.from_numpy(indices)])
            np.testing.assert_array_equal(y[row, : len(indices)], shard.y[torch.from_numpy(indices)])
