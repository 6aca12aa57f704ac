"""Models, shards and settings on which the fast trainer is held against others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedray.data.shards import Shard
from fedray.privacy.spec import NoiseLevelName, PrivacySpec
from fedray.tasks.classification import cross_entropy
from fedray.training.trainer import LocalTraining, Release

CPU = torch.device("cpu")

CLASSES = 5

STEPS = 5

Maker = Callable[[], nn.Module]


class Block(nn.Module):
    """Two encoder layers made of Linear and LayerNorm over token sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    # No bias: the keys' has no gradient but rounding, which Adam would blow up.
                    "qkv": nn.Linear(8, 24, bias=False),
                    "out": nn.Linear(8, 8),
                    "norm1": nn.LayerNorm(8),
                    "up": nn.Linear(8, 16),
                    "down": nn.Linear(16, 8),
                    "norm2": nn.LayerNorm(8),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm1"](x)).chunk(3, dim=-1)
            x = x + layer["out"](torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v)
            x = x + layer["down"](torch.relu(layer["up"](layer["norm2"](x))))
        return self.head(x.mean(dim=1))


class Idle(nn.Module):
    """A model with a layer that its outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


class InPlace(nn.Module):
    """Changes a layer's output in place (Opacus' hooks refuse that)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu_(self.body(x)))  # type: ignore[no-any-return]


def image(*layers: nn.Module) -> Maker:
    def make() -> nn.Module:
        body = nn.Sequential(*layers, nn.Flatten())
        size = body(torch.zeros(1, 4, 6, 6)).shape[1]
        return nn.Sequential(body, nn.Linear(size, CLASSES))

    return make


def line(*layers: nn.Module) -> Maker:
    def make() -> nn.Module:
        body = nn.Sequential(*layers, nn.Flatten())
        size = body(torch.zeros(1, 4, 10)).shape[1]
        return nn.Sequential(body, nn.Linear(size, CLASSES))

    return make


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


MODELS: dict[str, tuple[Maker, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES, bias=False)), (6,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, CLASSES)), (6,)),
    "linear_idle": (Idle, (6,)),
    "linear_alone": (lambda: nn.Linear(6, CLASSES), (6,)),
    "linear_short_sequence": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Flatten(), nn.Linear(18, CLASSES)),
        (2, 6),
    ),
    "linear_long_sequence": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(24, CLASSES)),
        (12, 3),
    ),
    "linear_two_sequences": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.Linear(24, CLASSES)), (4, 3, 3)),
    "conv2d": (image(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 2, bias=False)), (4, 6, 6)),
    "conv2d_padding_stride": (image(nn.Conv2d(4, 6, 3, padding=(1, 2), stride=(2, 1)), nn.Tanh()), (4, 6, 6)),
    "conv2d_same_dilation": (image(nn.Conv2d(4, 5, (1, 3), padding="same", dilation=(1, 2)), nn.ReLU()), (4, 6, 6)),
    "conv2d_groups": (image(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 2, groups=8)), (4, 6, 6)),
    "conv1d": (line(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 4, 2, stride=2, dilation=2)), (4, 10)),
    "conv1d_groups": (line(nn.Conv1d(4, 4, 3, groups=4), nn.Tanh(), nn.Conv1d(4, 6, 1)), (4, 10)),
    "groupnorm": (image(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.GroupNorm(1, 6)), (4, 6, 6)),
    "layernorm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, CLASSES)), (6,)),
    "layernorm_many": (lambda: nn.Sequential(nn.LayerNorm([3, 4]), nn.Flatten(), nn.Linear(24, CLASSES)), (2, 3, 4)),
    "rmsnorm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.SiLU(), nn.Linear(8, CLASSES)), (6,)),
    "pooling": (image(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.AvgPool2d(2)), (4, 6, 6)),
    "frozen": (frozen, (6,)),
    "transformer": (Block, (7,)),
}


def shards_of(shape: tuple[int, ...], tokens: bool, sizes: Sequence[int] = (12, 1, 17)) -> list[Shard]:
    random = torch.Generator().manual_seed(1)
    found = []
    for size in sizes:
        y = torch.randint(0, CLASSES, (size,), generator=random)
        x = (
            torch.randint(0, 11, (size, *shape), generator=random)
            if tokens
            else torch.randn(size, *shape, generator=random)
        )
        found.append(Shard(x=x, y=y))
    return found


def training_of(level: NoiseLevelName, optimizer: str = "adam", batch_size: int = 3) -> LocalTraining:
    spec = PrivacySpec(
        noise_level=level,
        noise_multiplier=0.4,
        clip_norm=0.8,
        delta=1e-5,
        batch_size=batch_size,
        sample_rate=batch_size / 12,
        local_steps=STEPS,
        expected_cohort=3,
    )
    return LocalTraining(privacy=spec, optimizer=optimizer, lr=0.01, loss=cross_entropy)  # type: ignore[arg-type]


class Recorder:
    """Keeps every release."""

    def __init__(self) -> None:
        self.releases: dict[tuple[int, int], Release] = {}

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        return clipped

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        self.releases[release.gateway, release.step] = release
        return gradient


def distance(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(one.astype(np.float64) - other) / max(np.linalg.norm(one), 1e-30))
