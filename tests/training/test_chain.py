"""Chains of layers give what autograd gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedray.models.layout import Layout
from fedray.training.stacking import StackedModel
from tests.training.stacked_models import CLASSES, CPU, Maker

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
