"""The models of the throughput benchmark, and what a record of each looks like.

Built from layers that every measured system supports (Opacus' per-sample gradients are the narrowest). It must not
know how they are trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

NUM_CLASSES = 10
NUM_TOKENS, SEQUENCE, WIDTH, HEADS = 64, 16, 32, 4


@dataclass(frozen=True, kw_only=True)
class Record:
    """Shape of one record; `vocabulary` is set where it holds token numbers."""

    shape: tuple[int, ...]
    vocabulary: int | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How to build a model (randomly initialised), its records, and how many classes they fall into."""

    build: Callable[[], nn.Module]
    record: Record
    num_classes: int = NUM_CLASSES

    def __call__(self) -> nn.Module:
        return self.build()


def mlp(*widths: int) -> nn.Sequential:
    """Build Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Build two convolutions for 8×8 images of one channel."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, NUM_CLASSES),
    )


class Attention(nn.Module):
    """Multi-head self-attention from four Linear layers.

    nn.MultiheadAttention packs its projections into one raw parameter, which has no per-sample gradient.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        return self.output((scores.softmax(-1) @ value).transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    """One pre-norm encoder block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_feedforward = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.feedforward(self.norm_feedforward(x))


class Transformer(nn.Module):
    """A two-layer encoder that classifies a token sequence by its mean state."""

    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, WIDTH)
        self.blocks = nn.Sequential(Block(WIDTH, HEADS), Block(WIDTH, HEADS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)
        # Fixed, so that nothing trainable is shared by all records of a batch without a batch dimension.
        self.register_buffer("positions", sinusoids(SEQUENCE, WIDTH), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states = self.blocks(self.embedding(tokens) + self.positions)
        return self.head(self.norm(states).mean(-2))


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Return fixed position codes `[length, width]` (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


ARCHITECTURES = {
    "mlp": Architecture(build=lambda: mlp(32, 64, 64, NUM_CLASSES), record=Record(shape=(32,))),
    "cnn": Architecture(build=cnn, record=Record(shape=(1, 8, 8))),
    # fedray's default job: python -m fedray without flags.
    "default_mlp": Architecture(build=lambda: mlp(16, 32, 4), record=Record(shape=(16,)), num_classes=4),
    # Wider and wider for the cost against parameters: 77 thousand, 1.1 million.
    "mlp_256": Architecture(build=lambda: mlp(32, 256, 256, NUM_CLASSES), record=Record(shape=(32,))),
    "mlp_1024": Architecture(build=lambda: mlp(32, 1024, 1024, NUM_CLASSES), record=Record(shape=(32,))),
    # 6.26 million float32: 25 MB to broadcast and gather.
    "big_mlp": Architecture(build=lambda: mlp(32, 2480, 2480, NUM_CLASSES), record=Record(shape=(32,))),
    "transformer": Architecture(build=Transformer, record=Record(shape=(SEQUENCE,), vocabulary=NUM_TOKENS)),
}
