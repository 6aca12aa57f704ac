"""The stacked trainer is held against the Opacus trainer: same batches and noise bit for bit, same updates to 1e-5."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedray.data.shards import Shard
from fedray.errors import GatewayError
from fedray.models import Loss, cross_entropy
from fedray.params import Layout
from fedray.privacy.clipping import usable
from fedray.privacy.spec import NoiseLevelName, PrivacySpec
from fedray.streams import RoundKeys
from fedray.training.engines import Engine, new_trainer
from fedray.training.layers import Slot, StackedLinear, quick_norms
from fedray.training.stacking import StackedModel, reason_against
from fedray.training.trainer import LocalTraining, Release

CPU = torch.device("cpu")
CLASSES = 5
STEPS = 5
Maker = Callable[[], nn.Module]


class Block(nn.Module):
    """Two encoder layers made of Linear and LayerNorm over token sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    # No bias: the keys' has no gradient but rounding, which Adam would blow up.
                    "qkv": nn.Linear(8, 24, bias=False),
                    "out": nn.Linear(8, 8),
                    "norm1": nn.LayerNorm(8),
                    "up": nn.Linear(8, 16),
                    "down": nn.Linear(16, 8),
                    "norm2": nn.LayerNorm(8),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm1"](x)).chunk(3, dim=-1)
            x = x + layer["out"](torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v)
            x = x + layer["down"](torch.relu(layer["up"](layer["norm2"](x))))
        return self.head(x.mean(dim=1))


class Idle(nn.Module):
    """A model with a layer that its outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


class InPlace(nn.Module):
    """Changes a layer's output in place (Opacus' hooks refuse that)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu_(self.body(x)))  # type: ignore[no-any-return]


def _image(*layers: nn.Module) -> Maker:
    def make() -> nn.Module:
        body = nn.Sequential(*layers, nn.Flatten())
        size = body(torch.zeros(1, 4, 6, 6)).shape[1]
        return nn.Sequential(body, nn.Linear(size, CLASSES))

    return make


def _line(*layers: nn.Module) -> Maker:
    def make() -> nn.Module:
        body = nn.Sequential(*layers, nn.Flatten())
        size = body(torch.zeros(1, 4, 10)).shape[1]
        return nn.Sequential(body, nn.Linear(size, CLASSES))

    return make


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


MODELS: dict[str, tuple[Maker, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES, bias=False)), (6,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, CLASSES)), (6,)),
    "linear_idle": (Idle, (6,)),
    "linear_alone": (lambda: nn.Linear(6, CLASSES), (6,)),
    "linear_short_sequence": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Flatten(), nn.Linear(18, CLASSES)),
        (2, 6),
    ),
    "linear_long_sequence": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(24, CLASSES)),
        (12, 3),
    ),
    "linear_two_sequences": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.Linear(24, CLASSES)), (4, 3, 3)),
    "conv2d": (_image(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 2, bias=False)), (4, 6, 6)),
    "conv2d_padding_stride": (_image(nn.Conv2d(4, 6, 3, padding=(1, 2), stride=(2, 1)), nn.Tanh()), (4, 6, 6)),
    "conv2d_same_dilation": (_image(nn.Conv2d(4, 5, (1, 3), padding="same", dilation=(1, 2)), nn.ReLU()), (4, 6, 6)),
    "conv2d_groups": (_image(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 2, groups=8)), (4, 6, 6)),
    "conv1d": (_line(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 4, 2, stride=2, dilation=2)), (4, 10)),
    "conv1d_groups": (_line(nn.Conv1d(4, 4, 3, groups=4), nn.Tanh(), nn.Conv1d(4, 6, 1)), (4, 10)),
    "groupnorm": (_image(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.GroupNorm(1, 6)), (4, 6, 6)),
    "layernorm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, CLASSES)), (6,)),
    "layernorm_many": (lambda: nn.Sequential(nn.LayerNorm([3, 4]), nn.Flatten(), nn.Linear(24, CLASSES)), (2, 3, 4)),
    "rmsnorm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.SiLU(), nn.Linear(8, CLASSES)), (6,)),
    "pooling": (_image(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.AvgPool2d(2)), (4, 6, 6)),
    "frozen": (_frozen, (6,)),
    "transformer": (Block, (7,)),
}


def _shards(shape: tuple[int, ...], tokens: bool, sizes: Sequence[int] = (12, 1, 17)) -> list[Shard]:
    random = torch.Generator().manual_seed(1)
    found = []
    for size in sizes:
        y = torch.randint(0, CLASSES, (size,), generator=random)
        x = (
            torch.randint(0, 11, (size, *shape), generator=random)
            if tokens
            else torch.randn(size, *shape, generator=random)
        )
        found.append(Shard(x=x, y=y))
    return found


def _training(level: NoiseLevelName, optimizer: str = "adam", batch_size: int = 3) -> LocalTraining:
    spec = PrivacySpec(
        noise_level=level,
        noise_multiplier=0.4,
        clip_norm=0.8,
        delta=1e-5,
        batch_size=batch_size,
        sample_rate=batch_size / 12,
        local_steps=STEPS,
        expected_cohort=3,
    )
    return LocalTraining(privacy=spec, optimizer=optimizer, lr=0.01, loss=cross_entropy)  # type: ignore[arg-type]


class Recorder:
    """Keeps every release."""

    def __init__(self) -> None:
        self.releases: dict[tuple[int, int], Release] = {}

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        return clipped

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        self.releases[release.gateway, release.step] = release
        return gradient


def _both(
    name: str, training: LocalTraining, observe: bool = False, memory_limit: int = 2**31
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], list[Recorder]]:
    make, shape = MODELS[name]
    model = make()
    torch.manual_seed(3)
    for layer in model.modules():  # some are made when this file is imported
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    shards = _shards(shape, tokens=name == "transformer")
    keys = RoundKeys(round_key=bytes(range(32)), round_index=4)
    updates, recorders = [], []
    for engine in ("opacus", "stacked"):
        trainer = new_trainer(engine, model, training, CPU, memory_limit)  # type: ignore[arg-type]
        recorders.append(Recorder())
        trainer.observer = recorders[-1] if observe else None
        updates.append(trainer.train(keys, Layout.of(model).flatten(model), [0, 1, 2], shards))
    return updates[0], updates[1], recorders


def _distance(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(one.astype(np.float64) - other) / max(np.linalg.norm(one), 1e-30))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("level", ["none", "sample", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_stacked_updates_equal_opacus(name: str, level: NoiseLevelName, optimizer: str) -> None:
    reference, stacked, _ = _both(name, _training(level, optimizer))
    for one, other in zip(reference, stacked, strict=True):
        assert _distance(one, other) < 1e-5


@pytest.mark.parametrize("level", ["sample", "batch"])
@pytest.mark.parametrize("name", ["linear", "conv2d_groups", "transformer"])
def test_stacked_batches_and_noise_equal_opacus_bit_for_bit(name: str, level: NoiseLevelName) -> None:
    _, _, (reference, stacked) = _both(name, _training(level), observe=True)
    assert reference.releases.keys() == stacked.releases.keys()
    assert len(reference.releases) == 3 * STEPS
    for where, release in reference.releases.items():
        other = stacked.releases[where]
        np.testing.assert_array_equal(release.batch, other.batch)
        np.testing.assert_array_equal(release.noise, other.noise)
        assert release.divisor == other.divisor
        scale = max(float(np.linalg.norm(release.clipped)), 1e-3)
        assert np.linalg.norm(release.clipped - other.clipped) / scale < 1e-5


def test_stacked_shards_have_uneven_and_empty_batches() -> None:
    _, _, (reference, _) = _both("linear", _training("sample"), observe=True)
    sizes = {len(release.batch) for release in reference.releases.values()}
    assert 0 in sizes
    assert len(sizes) > 2


def test_stacked_observer_changes_nothing() -> None:
    _, plain, _ = _both("linear", _training("sample"))
    _, observed, _ = _both("linear", _training("sample"), observe=True)
    for one, other in zip(plain, observed, strict=True):
        assert _distance(one, other) < 1e-6


@pytest.mark.parametrize("level", ["none", "sample", "batch"])
def test_stacked_updates_do_not_depend_on_memory_limit(level: NoiseLevelName) -> None:
    _, together, _ = _both("conv2d", _training(level))
    _, alone, _ = _both("conv2d", _training(level), memory_limit=1)
    for one, other in zip(together, alone, strict=True):
        assert _distance(one, other) < 1e-5


def test_stacked_record_with_overflowing_gradient_is_selected_out() -> None:
    make, shape = MODELS["linear"]
    torch.manual_seed(3)
    model = make()
    shards = _shards(shape, tokens=False)
    shards[0].x[:6] = 3e38  # finite, but its gradient is not
    keys = RoundKeys(round_key=bytes(32), round_index=1)
    updates = [
        new_trainer(engine, model, _training("sample"), CPU).train(
            keys, Layout.of(model).flatten(model), [0, 1, 2], shards
        )
        for engine in ("opacus", "stacked")
    ]
    assert np.isfinite(updates[1]).all()
    assert _distance(updates[0], updates[1]) < 1e-5


@pytest.mark.parametrize("level", ["none", "batch"])
def test_stacked_embedding_padding_has_no_gradient(level: NoiseLevelName) -> None:
    # Opacus' per-record sampler gives the padding row a gradient that torch does not: compare where it is not used.
    model = nn.Sequential(nn.Embedding(11, 4, padding_idx=0), nn.Flatten(), nn.Linear(28, CLASSES))
    keys = RoundKeys(round_key=bytes(32), round_index=1)
    updates = [
        new_trainer(engine, model, _training(level, "sgd"), CPU).train(  # type: ignore[arg-type]
            keys, Layout.of(model).flatten(model), [0, 1, 2], _shards((7,), tokens=True)
        )
        for engine in ("opacus", "stacked")
    ]
    for one, other in zip(*updates, strict=True):
        assert _distance(one, other) < 1e-5


def _in_place_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    output.mul_(2.0)
    return cross_entropy(output, target)


def _detached_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.detach() + torch.zeros((), requires_grad=True)).sum(1)


_SHARED = nn.Tanh()


CHAINS: dict[str, Maker] = {
    "flatten_first": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
    "activation_first": lambda: nn.Sequential(
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, CLASSES)
    ),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), nn.Flatten(1), nn.Sequential(nn.Linear(9, CLASSES))
    ),
    "convolution": lambda: nn.Sequential(nn.Conv1d(3, 6, 2, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(18, CLASSES)),
    "shared_activation": lambda: nn.Sequential(
        nn.Flatten(), *(2 * [nn.Sequential(nn.Linear(12, 12), _SHARED)]), nn.Linear(12, CLASSES)
    ),
    "activation_last": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES), nn.ReLU()),
}


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("loss", [cross_entropy, _in_place_loss, _detached_loss])
@pytest.mark.parametrize("name", CHAINS)
def test_chain_catches_what_autograd_catches(name: str, loss: Loss, broken: bool) -> None:
    model = StackedModel(CHAINS[name](), CPU)
    random = torch.Generator().manual_seed(2)
    model.bind(torch.randn(2, model.num_params, generator=random))
    x, y = torch.randn(2, 4, 3, 4, generator=random), torch.randint(0, CLASSES, (2, 4), generator=random)
    if broken:
        x[0, 1], x[1, 1, 0] = torch.nan, 3e38
    kept, weights = x.clone(), torch.linspace(0.0, 1.0, 8).view(2, 4)
    assert model.chain is not None
    model.differentiate(loss, x, y, weights)
    found = [(layer.a, layer.e) for layer in model.layers]
    assert torch.equal(x, kept) or broken
    model.chain = None
    # The copy, as torch does not differentiate an activation whose output was changed in place.
    model.differentiate(lambda output, target: loss(output.clone(), target), kept, y, weights)
    # Bit for bit, but for the closed form of the default loss' gradient.
    rounding = 1e-6 if loss is cross_entropy else 0.0
    for layer, (a, e) in zip(model.layers, found, strict=True):
        torch.testing.assert_close(a, layer.a, rtol=0, atol=0, equal_nan=True)
        assert (e is None) == (layer.e is None)
        if e is not None:
            torch.testing.assert_close(e, layer.e, rtol=0, atol=rounding, equal_nan=True)


def _faint_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output * 1e-24).sum(1)


def test_clipping_holds_where_a_tiny_gradient_meets_a_huge_input() -> None:
    """1e-24 · 1e18 is far above C here, though float32 cannot hold the square of the first."""
    model, training = nn.Linear(6, CLASSES, bias=False), _training("sample")
    training = replace(training, loss=_faint_loss, privacy=replace(training.privacy, clip_norm=1e-9, sample_rate=1.0))
    shards, recorder = [Shard(x=torch.full((1, 6), 1e17), y=torch.zeros(1, dtype=torch.int64))], Recorder()
    trainer = new_trainer("stacked", model, training, CPU)
    trainer.observer = recorder
    trainer.train(RoundKeys(round_key=bytes(32), round_index=1), Layout.of(model).flatten(model), [0], shards)
    clipped = np.linalg.norm(recorder.releases[0, 0].clipped.astype(np.float64))
    assert 0.99e-9 < clipped <= 1e-9 * (1 + 1e-5)


class Kept(StackedLinear):
    """A layer of 3 gateways that has seen inputs and output gradients of these sizes."""

    def __init__(self, a: torch.Tensor, e: torch.Tensor) -> None:
        slots = {"weight": Slot(where=slice(0, 6), shape=(2, 3)), "bias": Slot(where=slice(6, 8), shape=(2,))}
        super().__init__(slots, {})
        self.a, self.e = a, e


def _kept(scale_a: float, scale_e: float, seed: int) -> Kept:
    random = torch.Generator().manual_seed(seed)
    a, e = (torch.randn(3, 40, size, generator=random) for size in (300, 5))
    return Kept(a * scale_a, e * scale_e)


@pytest.mark.parametrize("scale_a", [0.0, 1e-12, 1.0, 1e6])
@pytest.mark.parametrize("scale_e", [0.0, 1e-30, 1e-12, 1.0, 1e6])
def test_quick_norms_are_those_of_float64(scale_a: float, scale_e: float) -> None:
    layers = [_kept(scale_a, scale_e, 1), _kept(1.0, 1e-3, 2)]
    found = quick_norms(layers, torch.Size((3, 40)), 1.0)
    assert found is not None
    expected = torch.stack([layer.squared_norms() for layer in layers]).sum(0).sqrt()
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-6, atol=1e-7)


def test_quick_norms_are_usable_up_to_the_largest_inputs() -> None:
    """At 1e8·C, past which they are refused, as many layers as 1000 stay below the norm that counts as infinite."""
    value = torch.full((3, 40, 1), 9.99e7)
    found = quick_norms([Kept(value, value)] * 1000, torch.Size((3, 40)), 1.0)
    assert found is not None
    assert bool(usable(found).all())
    assert quick_norms([Kept(value * 1.01, value)], torch.Size((3, 40)), 1.0) is None


@pytest.mark.parametrize(
    ("scale_a", "scale_e", "clip_norm"),
    [
        (1.0, 1.0, 1e-9),
        (1e10, 1e-24, 1.0),
        (1e17, 1e-24, 1e-9),
        (1e2, 1e-20, 1e-15),
        (1.0, 1e12, 1.0),
        (1.0, float("nan"), 1.0),
    ],
)
def test_quick_norms_are_refused_where_float32_would_lose_what_counts(
    scale_a: float, scale_e: float, clip_norm: float
) -> None:
    layers = [_kept(1.0, 1.0, 1), _kept(scale_a, scale_e, 2)]
    assert quick_norms(layers, torch.Size((3, 40)), clip_norm) is None


def test_quick_norms_are_refused_where_the_input_of_a_bias_is_large_beside_the_clip_norm() -> None:
    small = [_kept(1e-4, 1e-4, 1)]
    assert quick_norms(small, torch.Size((3, 40)), 1e-8) is not None
    assert quick_norms(small, torch.Size((3, 40)), 0.9e-8) is None


def test_quick_norms_are_refused_for_rows_that_are_no_records() -> None:
    assert quick_norms([_kept(1.0, 1.0, 1)], torch.Size((3, 20)), 1.0) is None


def test_stacked_model_may_work_in_place() -> None:
    found = []
    for make in (InPlace, lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))):
        torch.manual_seed(3)
        model = make()
        trainer = new_trainer("stacked", model, _training("sample"), CPU)
        keys = RoundKeys(round_key=bytes(range(32)), round_index=4)
        found.append(trainer.train(keys, Layout.of(model).flatten(model), [0, 1, 2], _shards((6,), tokens=False)))
    assert _distance(*found) <= 1e-6


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def _own_forward() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    model[1].forward = lambda x: nn.functional.leaky_relu(x, 0.3)
    return model


def test_models_with_code_of_their_own_are_no_chain() -> None:
    for model in (Block(), _hooked(), _own_forward(), nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), InPlace()):
        assert StackedModel(model, CPU).chain is None


def test_a_global_hook_means_no_chain() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: output)
    try:
        assert StackedModel(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), CPU).chain is None
    finally:
        handle.remove()


class Reused(nn.Module):
    """Changes what a layer was given after the layer has used it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.other, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        hidden += self.other(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("level", ["none", "sample"])
def test_stacked_layer_notices_that_its_input_was_changed(level: NoiseLevelName) -> None:
    model = Reused()
    trainer = new_trainer("stacked", model, _training(level), CPU)
    keys = RoundKeys(round_key=bytes(range(32)), round_index=4)
    with pytest.raises(GatewayError, match="input of a StackedLinear was changed in place"):
        trainer.train(keys, Layout.of(model).flatten(model), [0, 1, 2], _shards((6,), tokens=False))


class RowsInBatch(nn.Module):
    """Hands the rows of a record to its layer as if they were records."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, (-1, 4)).mean(1)


@pytest.mark.parametrize("engine", ["opacus", "stacked"])
def test_rows_that_pose_as_records_are_refused(engine: Engine) -> None:
    model = RowsInBatch()
    assert "first dimension is not the batch" in str(reason_against(model, torch.randn(3, 4, 6)))
    trainer = new_trainer(engine, model, _training("sample"), CPU)
    keys = RoundKeys(round_key=bytes(range(32)), round_index=4)
    with pytest.raises(GatewayError, match="first dimension is not the batch"):
        trainer.train(keys, Layout.of(model).flatten(model), [0, 1, 2], _shards((4, 6), tokens=False))


class Placed(nn.Module):
    """Adds an embedding of the position, whose indices have no batch dimension."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.place, self.head = nn.Embedding(positions, 6), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head((x + self.place(torch.arange(x.shape[1]))).mean(1))
        return found


@pytest.mark.parametrize("positions", [2, 3, 4, 6])
def test_reason_against_positions_that_are_as_many_as_the_records_it_tries(positions: int) -> None:
    assert reason_against(Placed(positions), torch.randn(3, positions, 6)) is not None


def test_stacked_failure_names_gateways_and_keeps_traceback() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise ValueError("no luck")

    training = _training("sample")
    broken = LocalTraining(privacy=training.privacy, optimizer="adam", lr=0.01, loss=loss)
    trainer = new_trainer("stacked", nn.Linear(6, CLASSES), broken, CPU)
    keys = RoundKeys(round_key=bytes(32), round_index=7)
    with pytest.raises(GatewayError, match=r"gateways 0–2 failed in round 7: ValueError: no luck") as caught:
        trainer.train(keys, np.zeros(35, np.float32), [0, 1, 2], _shards((6,), tokens=False))
    assert 'raise ValueError("no luck")' in caught.value.details


class Twice(nn.Module):
    """Uses a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.inner(x)))  # type: ignore[no-any-return]


class Drawing(nn.Module):
    """Draws inside its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.dropout(x, 0.5))  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """Holds a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x * self.scale)  # type: ignore[no-any-return]


def _hooked_layer() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, CLASSES))
    model[0].register_full_backward_pre_hook(lambda module, gradients: gradients)
    return model


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Dropout(), nn.Linear(6, CLASSES)), r"0 \(Dropout\) draws random numbers"),
        (lambda: nn.Sequential(nn.Bilinear(6, 6, 6)), r"Bilinear\) is not on the list"),
        (lambda: nn.Sequential(nn.InstanceNorm1d(6, affine=True)), r"InstanceNorm1d\) is not on the list"),
        (lambda: nn.Sequential(nn.Conv1d(6, 4, 1, padding_mode="circular")), r"padding_mode 'circular' is not proven"),
        (_tied, r"1.weight shares its values"),
        (Twice, r"runs more than once"),
        (Drawing, r"draws random numbers"),
        (_hooked_layer, r"0 \(Linear\) has hooks or a forward of its own"),
        (Scaled, r"the model \(Scaled\) is not on the list"),
    ],
)
def test_reason_against_names_what_is_not_proven(make: Maker, reason: str) -> None:
    found = reason_against(make(), torch.randn(3, 6))
    assert found is not None
    assert re.search(reason, found), found


@pytest.mark.parametrize("name", MODELS)
def test_reason_against_is_none_for_proven_models(name: str) -> None:
    make, shape = MODELS[name]
    x = torch.randint(0, 11, (3, *shape)) if name == "transformer" else torch.randn(3, *shape)
    assert reason_against(make(), x) is None


@st.composite
def _architectures(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Draw a small chain of proven layers."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels, side = draw(st.integers(1, 3)), draw(st.integers(5, 7))
    layers: list[nn.Module] = []
    shape = (channels, side, side)
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["conv", "group", "layer", "relu", "pool"]))
        if kind == "conv" and min(shape[1:]) >= 3:
            out = draw(st.integers(1, 4))
            groups = 1 if shape[0] % 2 or out % 2 else draw(st.sampled_from([1, 2]))
            layers.append(
                nn.Conv2d(
                    shape[0],
                    out,
                    draw(st.integers(1, 3)),
                    stride=draw(st.integers(1, 2)),
                    padding=draw(st.integers(0, 1)),
                    groups=groups,
                    bias=draw(st.booleans()),
                )
            )
        elif kind == "group":
            layers.append(nn.GroupNorm(1, shape[0]))
        elif kind == "layer":
            layers.append(nn.LayerNorm(shape[1:]))
        elif kind == "pool" and min(shape[1:]) >= 2:
            layers.append(nn.AvgPool2d(2, stride=1))
        else:
            layers.append(nn.Tanh())
        shape = tuple(nn.Sequential(*layers)(torch.zeros(1, channels, side, side)).shape[1:])
    size = int(np.prod(shape))
    layers += [nn.Flatten(), nn.Linear(size, draw(st.integers(2, 6))), nn.Tanh()]
    layers.append(nn.Linear(layers[-2].out_features, CLASSES, bias=draw(st.booleans())))  # type: ignore[arg-type]
    return nn.Sequential(*layers), (channels, side, side)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(_architectures(), st.sampled_from(["none", "sample", "batch"]))
def test_stacked_updates_equal_opacus_on_random_architectures(
    drawn: tuple[nn.Module, tuple[int, ...]], level: NoiseLevelName
) -> None:
    model, shape = drawn
    shards = _shards(shape, tokens=False)
    keys = RoundKeys(round_key=bytes(range(32)), round_index=2)
    params = Layout.of(model).flatten(model)
    one, other = (
        new_trainer(engine, model, _training(level, "sgd"), CPU).train(keys, params, [0, 1, 2], shards)  # type: ignore[arg-type]
        for engine in ("opacus", "stacked")
    )
    for row, twin in zip(one, other, strict=True):
        assert np.linalg.norm(row.astype(np.float64) - twin) <= 1e-5 * np.linalg.norm(row) + 1e-9
