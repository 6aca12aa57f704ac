"""The task of a caller who brings a loss and nothing else: any finite targets, no metric beside the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fedray.errors import InputError
from fedray.tasks.task import Metric, Task

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class OwnLoss(Task):
    """What a loss by itself says about a task.

    Args:
        loss: Maps (output, target) to one value a record.
    """

    metrics: Sequence[Metric] = ()

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        vars(self)["losses"] = loss  # the caller's function itself, by which a run is known when it goes on

    def losses(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the caller's loss."""
        return self._loss(output, target)

    def check_outputs(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Check that outputs come record by record."""
        if outputs.shape[:1] != (len(targets),):
            raise InputError(
                f"--model: outputs have shape {tuple(outputs.shape)} for {len(targets)} records; their first dimension must "
                "be the batch: keep it first."
            )
