"""What is no sequence of proven parts is named."""

from __future__ import annotations

import re

import pytest
from torch import nn

from fedray.training.stacking import reason_against
from tests.training.stacked_models import CLASSES, MODELS, Block, InPlace, Maker


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
