"""Classification: targets are class indices, outputs one score a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedray.errors import InputError
from fedray.tasks.task import Array, Metric, Task, finite


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each record, `[n]`, from scores `[n, K]` and class indices `[n]`."""
    return nn.functional.cross_entropy(output, target, reduction="none")


@dataclass(frozen=True)
class Accuracy:
    """The share of records whose largest score is the target's."""

    name: str = "accuracy"

    def state(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return how many are right."""
        return (output.argmax(dim=-1) == target).sum()

    def value(self, state: torch.Tensor, num_records: int) -> float:
        """Return the share in [0, 1]."""
        return float(state) / num_records


class Classification(Task):
    """Class indices from 0 on, scores `[n, K]`, cross-entropy, accuracy."""

    metrics: Sequence[Metric] = (Accuracy(),)
    losses = staticmethod(cross_entropy)

    def check_targets(self, y: Array, where: str) -> Array:
        """Return class indices `[N]` as int64; floats count where they are whole."""
        if y.ndim != 1:
            raise InputError(f"{where} has shape {y.shape}; it must be one class index a record, shape ({len(y)},).")
        source = where.removesuffix(": y")
        if not np.isfinite(y).all():
            finite(y, where)
        if (y != np.floor(y)).any():
            bad = y[y != np.floor(y)][0]
            raise InputError(f"{source}: label {bad:g} is no whole number; labels are class indices from 0 on.")
        if int(y.min()) < 0 or int(y.max()) >= 2**63:
            bad = y.min() if y.min() < 0 else y.max()
            raise InputError(f"{source}: label {bad} is out of range; labels are class indices from 0 on.")
        return np.ascontiguousarray(y, np.int64)

    def num_outputs(self, targets: Sequence[Array]) -> int:
        """Return 1 + the largest label."""
        return max(int(y.max()) for y in targets) + 1

    def check_outputs(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Check that outputs are float scores `[n, K]`."""
        if outputs.dim() != 2 or len(outputs) != len(targets) or not outputs.is_floating_point():
            raise InputError(
                f"--model: outputs have shape {tuple(outputs.shape)} for {len(targets)} records; they must be scores "
                "[records, classes] in float32."
            )

    def check_fit(self, targets: Array, outputs: tuple[int, ...], where: str) -> None:
        """Check that every label has a score."""
        if int(targets.max()) >= outputs[0]:
            raise InputError(
                f"{where}: label {int(targets.max())} is out of range; the model has {outputs[0]} outputs, so labels "
                f"must be 0 … {outputs[0] - 1}."
            )
