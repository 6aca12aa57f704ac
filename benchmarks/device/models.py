"""The models of the GPU benchmark: an MLP, a ResNet of 1 M parameters, a 2-layer LSTM, a 10-M-parameter transformer with LoRA.

The transformer is written out here, so that a machine with torch alone can run it.
"""

from __future__ import annotations

import torch
from families.dense import DENSE
from families.family import NUM_CLASSES, Family, class_losses, measurements, tokens
from families.images import ResNet
from families.sequences import Recurrent
from torch import nn


class LoRALinear(nn.Module):
    """A frozen Linear layer with a trainable product of low rank beside it (Hu et al. 2021, section 4.1).

    Args:
        num_in: Width of the input.
        num_out: Width of the output.
        rank: Of the product.
        alpha: The product counts alpha / rank.
    """

    def __init__(self, num_in: int, num_out: int, rank: int, alpha: float = 16.0) -> None:
        super().__init__()
        self.frozen = nn.Linear(num_in, num_out).requires_grad_(False)
        self.down = nn.Linear(num_in, rank, bias=False)
        self.up = nn.Linear(rank, num_out, bias=False)
        nn.init.normal_(self.up.weight, std=0.02)  # zero, as usual, would leave `down` without a gradient to compare
        self._scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self._scale * self.up(self.down(x))


class AdaptedBlock(nn.Module):
    """A pre-norm encoder block whose queries and values are adapted; all else is frozen."""

    def __init__(self, width: int, heads: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query, self.value = LoRALinear(width, width, rank), LoRALinear(width, width, rank)
        self.key, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_feedforward = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for layer in (self.norm_attention, self.key, self.output, self.norm_feedforward, self.feedforward):
            layer.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.norm_attention(x)
        query, key, value = (
            layer(states).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        x = x + self.output((scores.softmax(-1) @ value).transpose(-3, -2).flatten(-2))
        return x + self.feedforward(self.norm_feedforward(x))


class AdaptedTransformer(nn.Module):
    """A frozen encoder of token sequences with LoRA in its attention, and a trainable head.

    Args:
        width: Of its states.
        blocks: How many.
        heads: Of each block.
        vocabulary: Of the frozen embedding.
        rank: Of the adapters.
    """

    def __init__(self, width: int, blocks: int, heads: int, vocabulary: int, rank: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width).requires_grad_(False)
        self.blocks = nn.Sequential(*(AdaptedBlock(width, heads, rank) for _ in range(blocks)))
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(x)).mean(-2))


def models(quick: bool) -> dict[str, Family]:
    """Return the models by key; `quick` makes them small enough for a dry run on a CPU."""
    states, features, hidden = (8, 8, 16) if quick else (32, 32, 128)
    widths, blocks = ((8, 16), 1) if quick else ((32, 64, 160), 2)
    width, layers, heads, vocabulary, length = (32, 2, 4, 64, 8) if quick else (384, 6, 6, 512, 64)
    batch = 64 if quick else 4096
    mlp = DENSE["mlp"]
    return {
        "mlp": Family(title=mlp.title, build=mlp.build, records=mlp.records, loss=mlp.loss, local_steps=2 if quick else 20,
                      shared_batch=batch),
        "resnet": Family(
            title=f"GroupNorm ResNet on 32×32×3, widths {'-'.join(map(str, widths))}",
            build=lambda: ResNet(widths, blocks),
            records=measurements(3, 32, 32),
            loss=class_losses,
            local_steps=1,
            shared_batch=batch // 4,
        ),
        "lstm": Family(
            title=f"LSTM, 2 layers of {hidden}, {states} positions",
            build=lambda: Recurrent(nn.LSTM(features, hidden, num_layers=2, batch_first=True)),
            records=measurements(states, features),
            loss=class_losses,
            local_steps=2,
            shared_batch=batch,
        ),
        "lora": Family(
            title=f"transformer of width {width}, {layers} blocks, LoRA, {length} tokens",
            build=lambda: AdaptedTransformer(width, layers, heads, vocabulary),
            records=tokens(length, vocabulary),
            loss=class_losses,
            local_steps=1,
            shared_batch=batch // 8,
        ),
    }  # fmt: skip
