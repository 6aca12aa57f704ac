"""The kinds of layers that can be stacked; tests/training proves each equal to the reference trainer."""

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
"""Each kind of leaf layer and the function that stacks it. Subclasses are not listed: their forward pass may differ."""
