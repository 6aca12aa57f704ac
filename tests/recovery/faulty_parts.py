"""A user's data and models that go wrong in one gateway, from a moment on that a test chooses.

Gateway 2's records are larger than everybody else's: a model sees by that whom it trains.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

MARKER = "FEDRAY_TEST_MARKER"
"""Environment variable: the file whose appearance starts the fault; read where the model is built."""


def data(gateways: int) -> Any:
    """Return shards and held-out data."""
    rng = np.random.default_rng(0)

    def shard(index: int) -> Any:
        x = rng.normal(size=(64, 5)).astype(np.float32)
        x[:, 0] = 100.0 if index == 2 else 0.0
        return x, rng.integers(0, 3, 64)

    return [shard(index) for index in range(gateways)], shard(0)


class Sensor(nn.Module):
    """Trains well until the marker appears."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.marker = os.environ[MARKER]
        self.everywhere = False
        self.large = torch.zeros(0, 1, dtype=torch.bool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(x)
        self.large = x.detach()[:, :1] > 50
        chosen = self.everywhere or bool(self.large.any())
        return self.fault(output) if self.training and chosen and os.path.exists(self.marker) else output

    def fault(self, output: torch.Tensor) -> torch.Tensor:
        """Go wrong."""
        return output


class Hangs(Sensor):
    def fault(self, output: torch.Tensor) -> torch.Tensor:
        Path(f"{self.marker}.pid").write_text(str(os.getpid()))
        time.sleep(10_000)
        return output


class Raises(Sensor):
    def fault(self, output: torch.Tensor) -> torch.Tensor:
        raise ValueError("the sensor broke")


class RaisesEverywhere(Raises):
    def __init__(self) -> None:
        super().__init__()
        self.everywhere = True


class Diverges(Sensor):
    def fault(self, output: torch.Tensor) -> torch.Tensor:
        return output + torch.where(self.large, float("nan"), 0.0)  # of its records only


class Devours(Sensor):
    def fault(self, output: torch.Tensor) -> torch.Tensor:
        return output + torch.zeros(10**15, dtype=torch.uint8).sum()
