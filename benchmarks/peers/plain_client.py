"""Local training of one gateway after the other without privacy, as a careful PyTorch user writes it.

Nothing of a gateway outlives its round (weights are received, the optimizer starts fresh), so one model built once
serves all of them: no loop over models can be faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn.functional import cross_entropy
from workload import Selection, Workload


class PlainClient:
    """A persistent model and Adam; `train` runs one gateway's round in place."""

    def __init__(self, workload: Workload) -> None:
        self.model = workload.build_model()
        self.parameters = list(self.model.parameters())
        self._optimizer = workload.build_optimizer(self.parameters)
        self._workload = workload

    def train(
        self, received: Sequence[torch.Tensor], x: torch.Tensor, y: torch.Tensor, selections: Iterable[Selection]
    ) -> None:
        """Train from the received parameters over the selected records; the result is in `parameters`."""
        load(self.parameters, received, self._optimizer)
        divisor = self._workload.divisor(len(x))
        for selection in selections:
            loss = cross_entropy(self.model(x[selection]), y[selection], reduction="sum") / divisor
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()


@torch.no_grad()
def load(
    parameters: Sequence[torch.Tensor], received: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Copy the received parameters in place and bring the optimizer back to its first step."""
    for parameter, value in zip(parameters, received, strict=True):
        parameter.copy_(value)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
