"""The round loop of the bare baselines: every gateway in turn in one process, then the mean of their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from measurement import Measurement
from torch import nn
from workload import Selection, Workload


class Client(Protocol):
    """Runs one gateway's round in place."""

    model: nn.Module
    parameters: list[nn.Parameter]

    def train(
        self, received: Sequence[torch.Tensor], x: torch.Tensor, y: torch.Tensor, selections: Iterable[Selection]
    ) -> None: ...


def run(workload: Workload, client: Client, measurement: Measurement) -> dict[str, torch.Tensor]:
    """Run all rounds of FedAvg and return the final weights by state_dict name."""
    x, y = (torch.from_numpy(array) for array in workload.load_data())
    current = [parameter.detach().clone() for parameter in client.parameters]
    for round_number in range(workload.rounds):
        total = [torch.zeros_like(parameter) for parameter in current]
        for gateway in range(workload.gateways):
            batches = workload.batches(round_number, gateway, x.shape[1])
            client.train(current, x[gateway], y[gateway], batches)
            with torch.no_grad():
                torch._foreach_add_(total, client.parameters)
        current = [parameter / workload.gateways for parameter in total]
        measurement.round_ended()
    names = [name for name, _ in client.model.named_parameters()]
    return dict(zip(names, current, strict=True))
