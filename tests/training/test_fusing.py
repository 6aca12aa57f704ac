"""Formulas that are one operation of torch are run as that operation, and give what they gave."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedray.data.shards import Shard
from fedray.training.engines import traced
from tests.training.coupling import class_losses


class Written(nn.Module):
    """A perceptron whose activation is written out."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.activation(self.first(x)))  # type: ignore[no-any-return]


def by_power(x: torch.Tensor) -> torch.Tensor:
    """As Hugging Face's NewGELUActivation."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def by_stars(x: torch.Tensor) -> torch.Tensor:
    """As it is often written."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def another_slope(x: torch.Tensor) -> torch.Tensor:
    """Not GELU."""
    return 0.5 * x * (1 + torch.tanh(0.7 * (x + 0.044715 * x**3)))


def used_twice(x: torch.Tensor) -> torch.Tensor:
    """What the formula computes on its way is wanted elsewhere."""
    cube = x**3
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * cube))) + 0.01 * cube


@pytest.mark.parametrize(
    ("activation", "fused"), [(by_power, True), (by_stars, True), (another_slope, False), (used_twice, False)]
)
def test_gelu_that_is_written_out_is_one_operation(
    activation: Callable[[torch.Tensor], torch.Tensor], fused: bool
) -> None:
    torch.manual_seed(0)
    shard = Shard(x=torch.randn(3, 4), y=torch.tensor([0, 2, 1]))
    program = traced("alone", Written(activation).train(), class_losses, shard)  # holds it against autograd
    assert program is not None
    operations = {instruction.op for instruction in program.instructions}
    assert ("aten.gelu.default" in operations) == fused
    assert ("aten.tanh.default" in operations) != fused
