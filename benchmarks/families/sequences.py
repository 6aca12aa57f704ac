"""Families of the zoo on sequences: recurrences, attention, and parameters that many positions share."""

from __future__ import annotations

import torch
from architectures import ARCHITECTURES, NUM_TOKENS, SEQUENCE
from torch import nn

from families.family import NUM_CLASSES, Bars, Family, class_losses, measurements, tokens

FEATURES, WIDTH, HEADS = 16, 32, 4
STATES = 32  # positions that a recurrence walks along


class Recurrent(nn.Module):
    """A recurrence whose last state is classified."""

    def __init__(self, recurrence: nn.RNNBase) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.head = nn.Linear(recurrence.hidden_size, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.recurrence(x)
        return self.head(states[:, -1])


class SelfAttention(nn.Module):
    """torch's packed multi-head attention of a sequence with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.attention(x, x, x, need_weights=False)
        return self.head(states.mean(1))


class Encoded(nn.Module):
    """torch's encoder, its mean state classified."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


class Positions(nn.Module):
    """A raw parameter for each position, added to the records before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(8, FEATURES))
        self.hidden, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(x + self.positions)).mean(1))


class Tied(nn.Module):
    """Predicts the token that a short sequence belongs to; the embedding is the output layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, FEATURES)
        self.hidden, self.output = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, NUM_TOKENS, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.hidden(self.embedding(x).mean(1))))


class Bag(nn.Module):
    """Mean embeddings of the tokens of a record."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(NUM_TOKENS, WIDTH, mode="mean"), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.bag(x)))


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(_encoder_layer(), 2, enable_nested_tensor=False)


SEQUENCES = {
    "lstm": Family(
        title="LSTM",
        build=lambda: Recurrent(nn.LSTM(FEATURES, WIDTH, batch_first=True)),
        records=measurements(STATES, FEATURES),
        loss=class_losses,
        bars=Bars(of_plain=0.15),
    ),
    "gru": Family(
        title="GRU",
        build=lambda: Recurrent(nn.GRU(FEATURES, WIDTH, batch_first=True)),
        records=measurements(STATES, FEATURES),
        loss=class_losses,
        bars=Bars(of_plain=0.15),
    ),
    "rnn": Family(
        title="RNN",
        build=lambda: Recurrent(nn.RNN(FEATURES, WIDTH, batch_first=True)),
        records=measurements(STATES, FEATURES),
        loss=class_losses,
    ),
    "attention": Family(
        title="MultiheadAttention",
        build=SelfAttention,
        records=measurements(SEQUENCE, WIDTH),
        loss=class_losses,
    ),
    "encoder-layer": Family(
        title="TransformerEncoderLayer",
        build=lambda: Encoded(_encoder_layer()),
        records=measurements(SEQUENCE, WIDTH),
        loss=class_losses,
        bars=Bars(of_plain=0.35),
    ),
    "encoder": Family(
        title="TransformerEncoder, 2 layers",
        build=lambda: Encoded(_encoder()),
        records=measurements(SEQUENCE, WIDTH),
        loss=class_losses,
    ),
    "transformer": Family(
        title="transformer of Linear layers, 2 blocks",
        build=ARCHITECTURES["transformer"],
        records=tokens(SEQUENCE, NUM_TOKENS),
        loss=class_losses,
    ),
    "positions": Family(
        title="trainable position parameter",
        build=Positions,
        records=measurements(8, FEATURES),
        loss=class_losses,
        local_steps=20,
        bars=Bars(over_hooks=4.0),
    ),
    "tied": Family(
        title="tied weights",
        build=Tied,
        records=tokens(8, NUM_TOKENS),
        loss=class_losses,
        local_steps=20,
        bars=Bars(over_hooks=4.0),
    ),
    "embedding-bag": Family(
        title="EmbeddingBag", build=Bag, records=tokens(8, NUM_TOKENS), loss=class_losses, local_steps=20
    ),
}
