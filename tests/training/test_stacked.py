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
from fedray.models.calls import cross_entropy
from fedray.models.layout import Layout
from fedray.privacy.clipping import usable
from fedray.privacy.spec import NoiseLevelName, PrivacySpec
from fedray.privacy.streams import RoundKeys
from fedray.training.engines import Engine, new_trainer
from fedray.training.layers.layer import Slot
from fedray.training.layers.linear import StackedLinear, quick_norms
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
        nn.Flatten(), nn.Linear(12, 12), _SHARED, nn.Linear(12, 12), _SHARED, nn.Linear(12, CLASSES)
    ),
    "activation_last": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES), nn.ReLU()),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_catches_what_autograd_catches(name: str) -> None:
    model = CHAINS[name]()
    stacked = StackedModel(model, CPU)
    random = torch.Generator().manual_seed(2)
    params = torch.randn(2, stacked.num_params, generator=random)
    stacked.bind(params)
    x = torch.randn(2, 4, 3, 4, generator=random)
    kept, output = x.clone(), stacked.compute(x)
    gradient = torch.randn(output.shape, generator=random)
    stacked.chain.differentiate(gradient)
    assert torch.equal(x, kept)
    found = torch.zeros_like(params)
    for layer in stacked.layers:
        layer.add_sums(found, None)
    layout = Layout.of(model)
    for row in range(2):
        layout.load(model, params[row].numpy())
        own = model(kept[row].clone())
        torch.testing.assert_close(output[row], own)
        expected = torch.autograd.grad(own, list(model.parameters()), gradient[row])
        torch.testing.assert_close(found[row], torch.cat([one.flatten() for one in expected]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CHAINS)
def test_chain_keeps_what_is_not_finite_with_its_record(name: str) -> None:
    """Inputs and output gradients of other records and gateways are the same bits."""
    stacked = StackedModel(CHAINS[name](), CPU)
    random = torch.Generator().manual_seed(2)
    stacked.bind(torch.randn(2, stacked.num_params, generator=random))
    x, found = torch.randn(2, 4, 3, 4, generator=random), []
    for broken in (False, True):
        if broken:
            x[0, 1], x[1, 1, 0] = torch.nan, 3e38
        output = stacked.compute(x.clone())
        stacked.chain.differentiate(output * 0.5)
        found.append([(layer.a, layer.e) for layer in stacked.layers])
    others = [0, 2, 3]
    for whole, broken_pair in zip(*found, strict=True):
        for one, other in zip(whole, broken_pair, strict=True):
            first, second = (part.view(2, -1, *part.shape[1:])[:, :, others] for part in (one, other))
            assert torch.equal(first, second)


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


def product_losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return losses whose gradient at the outputs is the target: of any size."""
    return (output * target).sum(1)


@pytest.mark.parametrize("engine", ["sequence", "alone"])
@pytest.mark.parametrize("clip_norm", [1.0, 1e-4, 1e-10, 1e-15])
def test_clipping_holds_where_float32_would_round_a_factor_up(engine: Engine, clip_norm: float) -> None:
    """A factor of 1e-41 has few digits, and an input of 1e35 brings what they lack back."""
    model, training = nn.Sequential(nn.Linear(6, CLASSES, bias=False)), _training("sample")
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
    training = _training(level)
    training = replace(training, privacy=replace(training.privacy, sample_rate=0.5, local_steps=6))
    for seed, width in ((1, 8), (2, 64), (3, 300)):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, CLASSES))
        updates = []
        for size in (1.0, value):
            shards = _shards((6,), tokens=False)
            shards[1].x[-1] *= size
            trainer = new_trainer("stacked", model, training, CPU)
            keys = RoundKeys(round_key=bytes(32), round_index=1)
            updates.append(trainer.train(keys, Layout.of(model).flatten(model), [0, 1, 2], shards))
        for gateway in (0, 2):
            np.testing.assert_array_equal(updates[0][gateway], updates[1][gateway])


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


def _that_hold(layers: list[Kept], clip_norm: float) -> list[bool]:
    found = quick_norms(layers, torch.Size((3, 40)), clip_norm)
    return [False] * 3 if found is None else [True] * 3 if found[1] is None else found[1].tolist()


def _held(layers: list[Kept], clip_norm: float) -> torch.Tensor:
    found = quick_norms(layers, torch.Size((3, 40)), clip_norm)
    assert found is not None
    assert found[1] is None
    return found[0]


@pytest.mark.parametrize("scale_a", [0.0, 1e-12, 1.0, 1e6])
@pytest.mark.parametrize("scale_e", [0.0, 1e-30, 1e-12, 1.0, 1e6])
def test_quick_norms_are_those_of_float64(scale_a: float, scale_e: float) -> None:
    layers = [_kept(scale_a, scale_e, 1), _kept(1.0, 1e-3, 2)]
    found = _held(layers, 1.0)
    expected = torch.stack([layer.squared_norms() for layer in layers]).sum(0).sqrt()
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-6, atol=1e-7)


def test_quick_norms_are_usable_up_to_the_largest_inputs() -> None:
    """At 1e8·C, past which they are refused, as many layers as 1000 stay below the norm that counts as infinite."""
    value = torch.full((3, 40, 1), 9.99e7)
    found = _held([Kept(value, value)] * 1000, 1.0)
    assert bool(usable(found).all())
    assert _that_hold([Kept(value * 1.01, value)], 1.0) == [False] * 3


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
    assert _that_hold(layers, clip_norm) == [False] * 3


def test_quick_norms_are_refused_where_the_input_of_a_bias_is_large_beside_the_clip_norm() -> None:
    small = [_kept(1e-4, 1e-4, 1)]
    assert _that_hold(small, 1e-8) == [True] * 3
    assert _that_hold(small, 0.9e-8) == [False] * 3


@pytest.mark.parametrize("value", [3e18, 1e10, float("nan"), float("inf")])
def test_quick_norms_hold_for_gateways_whose_neighbour_has_a_record_of_any_size(value: float) -> None:
    layer = _kept(1.0, 1.0, 1)
    layer.a[1, 5] = value
    assert _that_hold([layer], 1.0) == [True, False, True]


@pytest.mark.parametrize("value", [3e18, 1e10, float("nan"), float("inf")])
def test_a_record_of_any_size_moves_no_other_gateways_sum_by_a_bit(value: float) -> None:
    torch.manual_seed(1)
    model, training = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)), _training("sample")
    training = replace(training, privacy=replace(training.privacy, sample_rate=1.0))
    sums = []
    for size in (1.0, value):
        shards, recorder = _shards((6,), tokens=False), Recorder()
        shards[1].x[-1] *= size
        trainer = new_trainer("stacked", model, training, CPU)
        trainer.observer = recorder
        trainer.train(RoundKeys(round_key=bytes(32), round_index=1), Layout.of(model).flatten(model), [0, 1, 2], shards)
        sums.append({gateway: recorder.releases[gateway, 0].clipped for gateway in range(3)})
    assert not np.array_equal(sums[0][1], sums[1][1])
    for gateway in (0, 2):
        np.testing.assert_array_equal(sums[0][gateway], sums[1][gateway])


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


def test_a_global_hook_means_no_sequence() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: output)
    try:
        assert "hooks" in str(reason_against(nn.Sequential(nn.Linear(6, 8), nn.ReLU())))
    finally:
        handle.remove()


@pytest.mark.parametrize("engine", ["stacked", "alone"])
def test_stacked_failure_names_gateways_and_keeps_traceback(engine: Engine) -> None:
    trainer = new_trainer(engine, nn.Sequential(nn.Linear(7, CLASSES)), _training("sample"), CPU)
    keys = RoundKeys(round_key=bytes(32), round_index=7)
    with pytest.raises(GatewayError, match=r"gateways? 0.* failed in round 7: ") as caught:
        trainer.train(keys, np.zeros(40, np.float32), [0, 1, 2], _shards((6,), tokens=False))
    assert "Traceback" in caught.value.details


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES))
    model[1].weight = model[0].weight
    return model


def _hooked_layer() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, CLASSES))
    model[0].register_full_backward_pre_hook(lambda module, gradients: gradients)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Dropout(), nn.Linear(6, CLASSES)), r"0 \(Dropout\) is not on the list"),
        (lambda: nn.Sequential(nn.Bilinear(6, 6, 6)), r"Bilinear\) is not on the list"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), r"1 \(LayerNorm\) is not on the list"),
        (lambda: nn.Sequential(nn.Conv1d(6, 4, 1, padding_mode="circular")), r"padding_mode 'circular' is not proven"),
        (lambda: nn.Sequential(nn.Flatten(0), nn.Linear(6, 4)), r"0 \(Flatten\) is not on the list"),
        (lambda: nn.Sequential(nn.Flatten(-2), nn.Linear(6, 4)), r"0 \(Flatten\) is not on the list"),
        (_tied, r"1.weight shares its values"),
        (lambda: nn.Sequential(*(2 * [nn.Linear(6, 6)])), r"shares its values"),
        (_hooked_layer, r"0 \(Linear\) has hooks or a forward of its own"),
        (_hooked, r"1 \(ReLU\) has hooks or a forward of its own"),
        (_own_forward, r"1 \(ReLU\) has hooks or a forward of its own"),
        (InPlace, r"the model \(InPlace\) is not on the list"),
        (Block, r"layers.0.norm1 \(LayerNorm\) is not on the list"),
    ],
)
def test_reason_against_names_what_is_not_proven(make: Maker, reason: str) -> None:
    found = reason_against(make())
    assert found is not None
    assert re.search(reason, found), found


@pytest.mark.parametrize("name", ["linear", "mlp", "linear_alone", "conv2d_groups", "frozen", "linear_two_sequences"])
def test_reason_against_is_none_for_sequences(name: str) -> None:
    assert reason_against(MODELS[name][0]()) is None


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
