"""Families of the zoo on vectors: perceptrons and layers that multiply."""

from __future__ import annotations

import torch
from architectures import mlp
from torch import nn

from families.family import NUM_CLASSES, Bars, Family, Records, class_losses, labels, measurements

WIDTH = 32


class Products(nn.Module):
    """A bilinear form of two views of the record."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.form = nn.Bilinear(16, 16, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.form(self.left(x), self.right(x))))


class TwoInputs(nn.Module):
    """Measurements and a category, joined before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.measured, self.category = nn.Linear(WIDTH, 64), nn.Embedding(16, 64)
        self.head = nn.Linear(64, NUM_CLASSES)

    def forward(self, measured: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.measured(measured) + self.category(category)))


def _pair(number: int, generator: torch.Generator) -> Records:
    measured = torch.randn(number, WIDTH, generator=generator)
    return (measured, torch.randint(16, (number,), generator=generator)), labels(number, generator)


def _named(number: int, generator: torch.Generator) -> Records:
    (measured, category), y = _pair(number, generator)
    return {"measured": measured, "category": category}, y


def _dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 128),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(128, NUM_CLASSES),
    )


def _prelu() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.PReLU(64), nn.Linear(64, 64), nn.PReLU(), nn.Linear(64, NUM_CLASSES))


DENSE = {
    "mlp": Family(
        title="MLP 32-64-64-10",
        build=lambda: mlp(WIDTH, 64, 64, NUM_CLASSES),
        records=measurements(WIDTH),
        loss=class_losses,
        local_steps=20,
    ),
    "dropout": Family(
        title="MLP with Dropout",
        build=_dropout,
        records=measurements(WIDTH),
        loss=class_losses,
        local_steps=20,
        draws=True,
        bars=Bars(over_hooks=4.0),
    ),
    "prelu": Family(
        title="MLP with PReLU", build=_prelu, records=measurements(WIDTH), loss=class_losses, local_steps=20
    ),
    "bilinear": Family(
        title="Bilinear", build=Products, records=measurements(WIDTH), loss=class_losses, local_steps=10
    ),
    "two-inputs-tuple": Family(
        title="two inputs (x a tuple)", build=TwoInputs, records=_pair, loss=class_losses, local_steps=20
    ),
    "two-inputs-dict": Family(
        title="two inputs (x a dict)", build=TwoInputs, records=_named, loss=class_losses, local_steps=20
    ),
}
