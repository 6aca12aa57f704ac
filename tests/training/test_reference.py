"""The reference trainer: a pure function of its arguments, plain SGD and Adam underneath, and honest errors."""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from fedray.errors import GatewayError
from fedray.models.layout import Layout
from fedray.privacy.sampling import PoissonSampler
from fedray.training.reference import OpacusTrainer
from fedray.training.trainer import LocalTraining, Release
from tests.privacy.worlds import (
    NUM_FEATURES,
    NUM_OUTPUTS,
    Recorder,
    keys_of,
    model_of,
    observe,
    product_loss,
    random_shard,
    spec_of,
    training_of,
)

CPU = torch.device("cpu")
ENGINE = "opacus"


def train(model: nn.Module, training: LocalTraining, gateways: list[int], *, seed: int = 1) -> npt.NDArray[np.float32]:
    """Train gateways with a fresh trainer."""
    shards = {gateway: random_shard(5 + gateway, seed=gateway) for gateway in gateways}
    trainer = OpacusTrainer(model, training, CPU)
    return trainer.train(keys_of(seed), Layout.of(model).flatten(model), gateways, shards)


@pytest.mark.parametrize("level", ["none", "sample", "batch", "gateway"])
def test_update_of_a_gateway_does_not_depend_on_the_others(level: str) -> None:
    """Together, alone or in another order: the same bits."""
    training = training_of(spec_of(level))
    together = train(model_of("mlp"), training, [0, 3, 4])
    for row, gateway in enumerate([0, 3, 4]):
        assert train(model_of("mlp"), training, [gateway])[0].tobytes() == together[row].tobytes()
    assert train(model_of("mlp"), training, [4, 0])[0].tobytes() == together[2].tobytes()


@pytest.mark.parametrize("level", ["none", "sample", "batch"])
def test_train_repeats_and_keeps_no_state(level: str) -> None:
    """The second call of the same trainer gives what the first gave; another round's keys give something else."""
    model, training = (
        model_of("mlp"),
        LocalTraining(privacy=spec_of(level), optimizer="adam", lr=0.1, loss=product_loss),
    )
    trainer, params = OpacusTrainer(model, training, CPU), Layout.of(model).flatten(model)
    shards = {0: random_shard(12)}
    first = trainer.train(keys_of(1), params, [0], shards)
    other = trainer.train(keys_of(1, 2), params, [0], shards)
    assert trainer.train(keys_of(1), params, [0], shards).tobytes() == first.tobytes() != other.tobytes()


def test_train_leaves_the_model_and_the_parameters_alone() -> None:
    """The caller's model, parameters and records are unchanged."""
    model, shard = model_of("mlp"), random_shard(8)
    params = Layout.of(model).flatten(model)
    before, x = params.copy(), shard.x.clone()
    params.setflags(write=False)  # as Ray hands it over
    OpacusTrainer(model, training_of(spec_of("sample")), CPU).train(keys_of(1), params, [0], {0: shard})
    assert Layout.of(model).flatten(model).tobytes() == before.tobytes() == params.tobytes()
    assert torch.equal(shard.x, x)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_plain_training_is_torch(optimizer: str) -> None:
    """Level `none` is a plain loop: mean loss over the drawn records, torch's optimizer, empty batches left out."""
    spec = spec_of("none", local_steps=6, sample_rate=0.2)
    training = LocalTraining(privacy=spec, optimizer=optimizer, lr=0.05, loss=product_loss)  # type: ignore[arg-type]  # a literal
    model, shard, keys = model_of("mlp"), random_shard(6), keys_of(4)
    update = OpacusTrainer(model, training, CPU).train(keys, Layout.of(model).flatten(model), [0], {0: shard})[0]
    plain = copy.deepcopy(model)
    steps = (
        torch.optim.SGD(plain.parameters(), 0.05) if optimizer == "sgd" else torch.optim.Adam(plain.parameters(), 0.05)
    )
    sizes = []
    for step in range(6):
        batch = torch.from_numpy(PoissonSampler(spec, keys, 0).batch(step, 6))
        sizes.append(len(batch))
        if len(batch):
            steps.zero_grad()
            product_loss(plain(shard.x[batch]), shard.y[batch]).mean().backward()
            steps.step()
    assert 0 in sizes, "an empty batch belongs into this test"
    expected = Layout.of(plain).flatten(plain) - Layout.of(model).flatten(model)
    np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", ["sample", "batch"])
def test_update_is_made_of_the_released_gradients(level: str) -> None:
    """With SGD the update is −lr times the sum of what was released: nothing else leaves the gateway."""
    training = training_of(spec_of(level, local_steps=7), lr=0.1)
    observed = observe(ENGINE, model_of("conv"), training, {0: random_shard(15)}, keys_of(2))
    total = np.sum([step.gradient for step in observed.steps.values()], axis=0)
    np.testing.assert_allclose(observed.updates[0], -0.1 * total, rtol=1e-3, atol=1e-5)


def test_observer_may_add_a_canary() -> None:
    """What `before_noise` returns is what is released."""

    class Canary(Recorder):
        def before_noise(
            self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
        ) -> torch.Tensor:
            return clipped + 1.0

    model, training = model_of("linear"), training_of(spec_of("sample"))
    honest = observe(ENGINE, model, training, {0: random_shard(9)}, keys_of(2))
    trainer, canary = OpacusTrainer(model, training, CPU), Canary(replay=honest.steps)
    trainer.observer = canary
    trainer.train(keys_of(2), Layout.of(model).flatten(model), [0], {0: random_shard(9)})
    for where, seen in canary.steps.items():
        release: Release = seen.release
        np.testing.assert_allclose(release.clipped, honest.steps[where].release.clipped + 1.0, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            seen.gradient, honest.steps[where].gradient + 1.0 / release.divisor, rtol=1e-4, atol=1e-5
        )


def test_parameter_that_is_not_used_gets_noise_alone() -> None:
    """A layer outside the forward pass is noised like any other: what stays still would tell."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(NUM_FEATURES, NUM_OUTPUTS), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            used: torch.Tensor = self.used(x)
            return used

    for level in ("sample", "batch"):
        observed = observe(ENGINE, Idle(), training_of(spec_of(level)), {0: random_shard(9)}, keys_of(2))
        for seen in observed.steps.values():
            assert not seen.release.clipped[-6:].any()
            assert seen.gradient[-6:].all()


def test_dropout_is_keyed() -> None:
    """Layers that draw repeat with the key and differ between steps, rounds and gateways."""
    model = nn.Sequential(nn.Linear(NUM_FEATURES, 30), nn.Dropout(0.5), nn.Linear(30, NUM_OUTPUTS))
    spec = spec_of("sample", sample_rate=1.0, clip_norm=100.0)
    runs = [
        observe(ENGINE, model, training_of(spec, lr=1e-6), {0: random_shard(8), 1: random_shard(8)}, keys_of(seed))
        for seed in (1, 1, 2)
    ]
    masks = [[seen.release.clipped.tobytes() for seen in run.steps.values()] for run in runs]
    assert masks[0] == masks[1]
    assert len({*masks[0], *masks[2]}) == 12


@pytest.mark.parametrize("level", ["none", "sample", "batch"])
def test_error_in_user_code_names_gateway_and_round(level: str) -> None:
    """The user's exception arrives as one sentence with its traceback beside it."""

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise KeyError("oops")

    with pytest.raises(GatewayError, match=r"gateway 3 failed in round 2: KeyError.*oops") as caught:
        OpacusTrainer(model_of("mlp"), training_of(spec_of(level), loss=loss), CPU).train(
            keys_of(1, 2), Layout.of(model_of("mlp")).flatten(model_of("mlp")), [3], {3: random_shard(20)}
        )
    assert "Traceback" in caught.value.details
