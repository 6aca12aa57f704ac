"""The proven list of layers; each kind is proven equal to the reference trainer by tests/training."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedray.training.layers.convolution import stacked_convolution
from fedray.training.layers.embedding import stacked_embedding
from fedray.training.layers.linear import stacked_linear

KINDS: dict[type[nn.Module], Any] = {
    nn.Linear: stacked_linear,
    nn.Conv1d: stacked_convolution,
    nn.Conv2d: stacked_convolution,
    nn.Embedding: stacked_embedding,
}
"""The proven list: how each kind of leaf layer is stacked. Subclasses are not on it: their forward may differ."""
