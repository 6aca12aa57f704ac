"""A user's data that go wrong in one gateway, or in all, from a moment on that a test chooses; and a model for them.

Of a user's code, gateways run what loads a shard. A shard here is larger than `FLAGS` let an actor keep beside another one,
so each round loads all shards of an actor that has two gateways or more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

MARKER = "FEDRAY_TEST_MARKER"
"""Environment variable: the file whose appearance starts the fault; read where the data set is made."""
FAULTY = 1
"""The gateway that goes wrong; its records are larger than everybody else's. Not the first one of its actor, which may be
trained on records that were kept for it while the actor had nothing to do."""
NUM_RECORDS = 10_000
# At this batch size and memory limit gateways are trained one after the other.
FLAGS = [*("--samples-per-gateway", str(NUM_RECORDS), "--batch-size", "2500", "--memory-limit", "1")]

Features = npt.NDArray[np.float32]
Fault = Callable[[Features, str], Features]


def fine(x: Features, _marker: str) -> Features:
    """Return the records as they are."""
    return x


def hang(x: Features, marker: str) -> Features:
    """Say who hangs, and hang."""
    Path(f"{marker}.pid").write_text(str(os.getpid()))
    time.sleep(10_000)
    return x


def break_down(_x: Features, _marker: str) -> Features:
    """Raise."""
    raise ValueError("the sensor broke")


def leave(_x: Features, _marker: str) -> Features:
    """Leave the program, as if all was well."""
    raise SystemExit(0)


def devour(x: Features, _marker: str) -> Features:
    """Ask for more memory than any machine has."""
    return x + np.zeros(10**16, np.uint8).sum()


def diverge(x: Features, _marker: str) -> Features:
    """Return records that are finite, but whose outputs by `model` are not."""
    return np.full_like(x, np.finfo(np.float32).max)


def spoil(x: Features, _marker: str) -> Features:
    """Return records that break a rule."""
    return np.full_like(x, np.nan)


@dataclass(frozen=True)
class Shards:
    """Lazy shards, one of which, or all, go wrong when the marker appears."""

    gateways: int
    fault: Fault
    marker: str
    everywhere: bool

    def __len__(self) -> int:
        return self.gateways

    def __getitem__(self, index: int) -> tuple[Features, npt.NDArray[np.int64]]:
        rng = np.random.default_rng(index)
        x = rng.normal(size=(NUM_RECORDS, 5)).astype(np.float32)
        x[:, 0] = 100.0 if index == FAULTY else 0.0
        if (self.everywhere or index == FAULTY) and os.path.exists(self.marker):
            x = self.fault(x, self.marker)
        return x, rng.integers(0, 3, NUM_RECORDS)


def data_set(fault: Fault, everywhere: bool = False) -> Callable[[int], Any]:
    """Return a function for --dataset."""

    def data(gateways: int) -> Any:
        rng = np.random.default_rng(99)
        test = rng.normal(size=(64, 5)).astype(np.float32), rng.integers(0, 3, 64)
        return Shards(gateways, fault, os.environ[MARKER], everywhere), test

    return data


def model() -> nn.Module:
    """Return a layer whose weights are so large that its outputs for the largest numbers are infinite."""
    layer = nn.Linear(5, 3)
    nn.init.constant_(layer.weight, 2.0)
    return layer


sound = data_set(fine)
hangs = data_set(hang)
raises = data_set(break_down)
leaves = data_set(leave)
devours = data_set(devour)
diverges = data_set(diverge)
diverges_everywhere = data_set(diverge, everywhere=True)
spoils = data_set(spoil)
