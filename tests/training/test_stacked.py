"""The stacked trainer is held against the Opacus trainer: same batches and noise bit for bit, same updates to 1e-5."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedray.errors import GatewayError
from fedray.models.layout import Layout
from fedray.privacy.spec import NoiseLevelName
from fedray.privacy.streams import RoundKeys
from fedray.training.engines import Engine, new_trainer
from fedray.training.trainer import LocalTraining
from tests.training.stacked_models import (
    CLASSES,
    CPU,
    MODELS,
    STEPS,
    InPlace,
    Recorder,
    distance,
    shards_of,
    training_of,
)


def _both(
    name: str, training: LocalTraining, observe: bool = False, memory_limit: int = 2**31
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], list[Recorder]]:
    make, shape = MODELS[name]
    model = make()
    torch.manual_seed(3)
    for layer in model.modules():  # some are made when this file is imported
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    shards = shards_of(shape, tokens=name == "transformer")
    keys = RoundKeys(round_key=bytes(range(32)), round_index=4)
    updates, recorders = [], []
    for engine in ("opacus", "stacked"):
        trainer = new_trainer(engine, model, training, CPU, memory_limit)  # type: ignore[arg-type]
        recorders.append(Recorder())
        trainer.observer = recorders[-1] if observe else None
        updates.append(trainer.train(keys, Layout.of(model).flatten(model), [0, 1, 2], shards))
    return updates[0], updates[1], recorders


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("level", ["none", "sample", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_stacked_updates_equal_opacus(name: str, level: NoiseLevelName, optimizer: str) -> None:
    reference, stacked, _ = _both(name, training_of(level, optimizer))
    for one, other in zip(reference, stacked, strict=True):
        assert distance(one, other) < 1e-5


@pytest.mark.parametrize("level", ["sample", "batch"])
@pytest.mark.parametrize("name", ["linear", "conv2d_groups", "transformer"])
def test_stacked_batches_and_noise_equal_opacus_bit_for_bit(name: str, level: NoiseLevelName) -> None:
    _, _, (reference, stacked) = _both(name, training_of(level), observe=True)
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
    _, _, (reference, _) = _both("linear", training_of("sample"), observe=True)
    sizes = {len(release.batch) for release in reference.releases.values()}
    assert 0 in sizes
    assert len(sizes) > 2


def test_stacked_observer_changes_nothing() -> None:
    _, plain, _ = _both("linear", training_of("sample"))
    _, observed, _ = _both("linear", training_of("sample"), observe=True)
    for one, other in zip(plain, observed, strict=True):
        assert distance(one, other) < 1e-6


@pytest.mark.parametrize("level", ["none", "sample", "batch"])
def test_stacked_updates_do_not_depend_on_memory_limit(level: NoiseLevelName) -> None:
    _, together, _ = _both("conv2d", training_of(level))
    _, alone, _ = _both("conv2d", training_of(level), memory_limit=1)
    for one, other in zip(together, alone, strict=True):
        assert distance(one, other) < 1e-5


def test_stacked_record_with_overflowing_gradient_is_selected_out() -> None:
    make, shape = MODELS["linear"]
    torch.manual_seed(3)
    model = make()
    shards = shards_of(shape, tokens=False)
    shards[0].x[:6] = 3e38  # finite, but its gradient is not
    keys = RoundKeys(round_key=bytes(32), round_index=1)
    updates = [
        new_trainer(engine, model, training_of("sample"), CPU).train(
            keys, Layout.of(model).flatten(model), [0, 1, 2], shards
        )
        for engine in ("opacus", "stacked")
    ]
    assert np.isfinite(updates[1]).all()
    assert distance(updates[0], updates[1]) < 1e-5


@pytest.mark.parametrize("level", ["none", "batch"])
def test_stacked_embedding_padding_has_no_gradient(level: NoiseLevelName) -> None:
    # Opacus' per-record sampler gives the padding row a gradient that torch does not: compare where it is not used.
    model = nn.Sequential(nn.Embedding(11, 4, padding_idx=0), nn.Flatten(), nn.Linear(28, CLASSES))
    keys = RoundKeys(round_key=bytes(32), round_index=1)
    updates = [
        new_trainer(engine, model, training_of(level, "sgd"), CPU).train(  # type: ignore[arg-type]
            keys, Layout.of(model).flatten(model), [0, 1, 2], shards_of((7,), tokens=True)
        )
        for engine in ("opacus", "stacked")
    ]
    for one, other in zip(*updates, strict=True):
        assert distance(one, other) < 1e-5


def test_stacked_model_may_work_in_place() -> None:
    found = []
    for make in (InPlace, lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))):
        torch.manual_seed(3)
        model = make()
        trainer = new_trainer("stacked", model, training_of("sample"), CPU)
        keys = RoundKeys(round_key=bytes(range(32)), round_index=4)
        found.append(trainer.train(keys, Layout.of(model).flatten(model), [0, 1, 2], shards_of((6,), tokens=False)))
    assert distance(*found) <= 1e-6


@pytest.mark.parametrize("engine", ["stacked", "alone"])
def test_stacked_failure_names_gateways_and_keeps_traceback(engine: Engine) -> None:
    trainer = new_trainer(engine, nn.Sequential(nn.Linear(7, CLASSES)), training_of("sample"), CPU)
    keys = RoundKeys(round_key=bytes(32), round_index=7)
    with pytest.raises(GatewayError, match=r"gateways? 0.* failed in round 7: ") as caught:
        trainer.train(keys, np.zeros(40, np.float32), [0, 1, 2], shards_of((6,), tokens=False))
    assert "Traceback" in caught.value.details


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
    shards = shards_of(shape, tokens=False)
    keys = RoundKeys(round_key=bytes(range(32)), round_index=2)
    params = Layout.of(model).flatten(model)
    one, other = (
        new_trainer(engine, model, training_of(level, "sgd"), CPU).train(keys, params, [0, 1, 2], shards)  # type: ignore[arg-type]
        for engine in ("opacus", "stacked")
    )
    for row, twin in zip(one, other, strict=True):
        assert np.linalg.norm(row.astype(np.float64) - twin) <= 1e-5 * np.linalg.norm(row) + 1e-9
