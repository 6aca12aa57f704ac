"""Any model: families of layers train alone, with the gradients of torch.autograd on single records, alone and in groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedray.data.inputs import Inputs, leaves, rebuilt
from fedray.data.shards import Shard
from fedray.models.calls import call_model
from fedray.models.layout import Layout
from fedray.tasks.classification import cross_entropy
from fedray.training.engines import new_trainer
from fedray.training.trainer import LocalTraining
from tests.privacy.worlds import Recorder, keys_of, spec_of

CLASSES, TOKENS, LENGTH, WIDTH, C = 4, 11, 6, 8, 0.7


class Through(nn.Module):
    """A layer between others, with what it returns made flat."""

    def __init__(self, layer: nn.Module, take: Callable[[Any], torch.Tensor] = lambda out: out) -> None:
        super().__init__()
        self.layer, self.head, self._take = layer, nn.LazyLinear(CLASSES), take

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self._take(self.layer(x)).flatten(1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """torch's packed attention, of a sequence with itself or with another one."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.across, self.head = across, nn.Linear(WIDTH, CLASSES)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dropout=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x.flip(1) * 2 if self.across else x
        states, _ = self.attention(x, other, other, need_weights=self.across)
        return self.head(states.mean(1))  # type: ignore[no-any-return]


class Raw(nn.Module):
    """Parameters of its own: an offset by position, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.scale = nn.Parameter(torch.randn(LENGTH, WIDTH)), nn.Parameter(torch.ones(()))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh((x + self.offset) * self.scale).mean(1))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """The embedding is the output layer as well, and a matrix is used twice, once turned."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        self.out.weight = self.embedding.weight
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embedding(tokens).mean(1) @ self.square
        return self.out(torch.tanh(h) @ self.square.t())  # type: ignore[no-any-return]


class Pair(nn.Module):
    """Takes measurements and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, WIDTH), nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, measured: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(measured) + self.second(tokens).sum(1)))  # type: ignore[no-any-return]


class Forms(nn.Module):
    """A bilinear form, and matrices that are used as values."""

    def __init__(self) -> None:
        super().__init__()
        self.form, self.head = nn.Bilinear(WIDTH, WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = x[:, 0], x[:, 1]
        weight = self.head.weight / self.head.weight.norm()
        return functional.linear(torch.einsum("ni,ki->nk", self.form(one, other), self.head.weight) @ weight, weight)


class Padded(nn.Module):
    """Embeddings with a padding index, and a mask that hides it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(self.embedding(tokens), src_key_padding_mask=tokens == 0)
        seen = (tokens != 0).unsqueeze(2)
        return self.head((hidden * seen).sum(1) / seen.sum(1).clamp(min=1))  # type: ignore[no-any-return]


class InPlace(nn.Module):
    """Works in place, and leaves a part out of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x.mean(1))
        functional.relu_(h)
        h = h * 2
        h[:, :2] = 0.5
        with torch.no_grad():
            context = self.norm(h)
        return self.head(h.add_(context.detach()))  # type: ignore[no-any-return]


def _frozen_features() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Flatten(), nn.LazyLinear(CLASSES))
    model[0].requires_grad_(False)
    return model


def _sequences(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


IMAGE, VOLUME, SEQUENCE = (3, 6, 6), (2, 4, 4, 4), (LENGTH, WIDTH)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "lstm": (lambda: Through(nn.LSTM(WIDTH, 5, 2, batch_first=True), lambda out: out[0]), SEQUENCE),
    "lstm, both ways, last state": (
        lambda: Through(nn.LSTM(WIDTH, 5, bidirectional=True, batch_first=True), lambda out: out[1][1].transpose(0, 1)),
        SEQUENCE,
    ),
    "gru": (lambda: Through(nn.GRU(WIDTH, 5, 2, batch_first=True, bidirectional=True), lambda out: out[0]), SEQUENCE),
    "gru without bias": (lambda: Through(nn.GRU(WIDTH, 5, bias=False, batch_first=True), lambda out: out[0]), SEQUENCE),
    "rnn": (lambda: Through(nn.RNN(WIDTH, 5, batch_first=True), lambda out: out[0]), SEQUENCE),
    "rnn with relu": (
        lambda: Through(nn.RNN(WIDTH, 5, nonlinearity="relu", batch_first=True), lambda o: o[0]),
        SEQUENCE,
    ),
    "lstm cell": (lambda: Through(nn.LSTMCell(LENGTH * WIDTH, 5), lambda out: out[0]), (LENGTH * WIDTH,)),
    "attention": (lambda: Attention(across=False), SEQUENCE),
    "attention across": (lambda: Attention(across=True), SEQUENCE),
    "encoder layer": (
        lambda: Through(nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=True)),
        SEQUENCE,
    ),
    "encoder": (
        lambda: Through(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, "gelu", batch_first=True), 2)
        ),
        SEQUENCE,
    ),
    "padded tokens": (Padded, "tokens"),
    "conv2d": (lambda: Through(nn.Conv2d(3, 4, 3, padding=1, stride=2, groups=1)), IMAGE),
    "conv1d": (lambda: Through(nn.Conv1d(LENGTH, 4, 3, dilation=2)), SEQUENCE),
    "conv3d": (lambda: Through(nn.Sequential(nn.Conv3d(2, 3, 2), nn.MaxPool3d(2), nn.ReLU())), VOLUME),
    "transposed convolution": (lambda: Through(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)), IMAGE),
    "grouped convolution": (lambda: Through(nn.Conv2d(3, 6, 3, groups=3, padding="same")), IMAGE),
    "circular convolution": (lambda: Through(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), IMAGE),
    "instance norm": (lambda: Through(nn.InstanceNorm2d(3, affine=True)), IMAGE),
    "group norm and pooling": (lambda: Through(nn.Sequential(nn.GroupNorm(3, 3), nn.AvgPool2d(2), nn.ELU())), IMAGE),
    "adaptive pooling": (lambda: Through(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2))), IMAGE),
    "upsampling": (
        lambda: Through(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Upsample(scale_factor=2, mode="bilinear"))),
        IMAGE,
    ),
    "rms norm": (lambda: Through(nn.Sequential(nn.RMSNorm(WIDTH), nn.SiLU())), SEQUENCE),
    "layer norm over two dimensions": (lambda: Through(nn.LayerNorm([LENGTH, WIDTH])), SEQUENCE),
    "prelu": (lambda: Through(nn.Sequential(nn.Linear(WIDTH, 5), nn.PReLU(), nn.PReLU(LENGTH))), SEQUENCE),
    "embedding bag": (lambda: Through(nn.EmbeddingBag(TOKENS, WIDTH)), "tokens"),
    "embedding bag of sums": (lambda: Through(nn.EmbeddingBag(TOKENS, WIDTH, mode="sum")), "tokens"),
    "bilinear": (Forms, SEQUENCE),
    "raw parameters": (Raw, SEQUENCE),
    "tied weights": (Tied, "tokens"),
    "in place": (InPlace, SEQUENCE),
    "frozen features": (_frozen_features, SEQUENCE),
    "two inputs": (Pair, "pair"),
    "named inputs": (Pair, "named"),
}


def records(kind: Any, number: int, seed: int = 0) -> tuple[Inputs, torch.Tensor]:
    """Draw records: of a shape, of tokens, or of both."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (number,), generator=random)
    if isinstance(kind, tuple):
        return torch.randn(number, *kind, generator=random), y
    tokens = torch.randint(TOKENS, (number, LENGTH), generator=random)
    if kind == "tokens":
        return tokens, y
    measured = torch.randn(number, 3, generator=random)
    return (measured, tokens) if kind == "pair" else {"measured": measured, "tokens": tokens}, y


def model_of(name: str) -> nn.Module:
    """Build a family's model away from its initial parameters."""
    make, kind = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = make().train()
        x, _ = records(kind, 2)
        call_model(model, x)  # gives lazy layers their sizes
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def clipped_sum(model: nn.Module, x: Inputs, y: torch.Tensor) -> np.ndarray:
    """Return the sum of clipped gradients by torch.autograd, one record at a time."""
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = np.zeros(Layout.of(model).num_params)
    for i in range(len(y)):
        one = rebuilt(x, [leaf[i : i + 1] for leaf in leaves(x)])
        loss = cross_entropy(call_model(model, one), y[i : i + 1]).sum()
        found = torch.autograd.grad(loss, params, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
        flat = torch.cat([part.flatten() for part in parts]).double().numpy()
        total += flat * min(1.0, C / np.linalg.norm(flat))
    return total


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_the_gradients_of_single_records(name: str, together: int) -> None:
    model = model_of(name)
    sizes = (5, 4, 6)[:together]
    shards = {i: Shard(*records(FAMILIES[name][1], size, seed=i)) for i, size in enumerate(sizes)}
    spec = spec_of("sample", clip_norm=C, sample_rate=1.0, local_steps=1)
    trainer = new_trainer(
        "alone", model, LocalTraining(privacy=spec, optimizer="sgd", lr=0.1, loss=cross_entropy), torch.device("cpu")
    )
    trainer.observer = recorder = Recorder()
    trainer.train(keys_of(1), Layout.of(model).flatten(model), range(together), shards)
    for gateway, shard in shards.items():
        expected, found = clipped_sum(model, shard.x, shard.y), recorder.steps[gateway, 0].release.clipped
        assert np.linalg.norm(expected) > 0.1
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
