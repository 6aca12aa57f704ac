"""Models and losses that couple the records of a batch, or remember them: mutants for tests of isolation.

The first six broke fedray's first trainers; the figures of their harm are in the issue that this suite answers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

FEATURES, WIDTH, CLASSES = 5, 8, 3
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def class_losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each record."""
    return functional.cross_entropy(output, target, reduction="none")


class Body(nn.Module):
    """A perceptron whose hidden values `mixed` may couple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        """Return the hidden values, coupled."""
        return h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.mixed(self.first(x))))  # type: ignore[no-any-return]


class GateOnBatchMean(Body):
    """A residual gate on what a record has beyond the batch's mean; its last layer starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.gate(h - h.mean(0))


class StatisticsFromEight(Body):
    """Looks at other records from eight on."""

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        return (h - h.mean(0)) / (h.std(0) + 0.1) if len(h) >= 8 else h


class HandMadeBatchNorm(Body):
    """Batch normalisation in plain attributes, beside Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.variance = torch.zeros(WIDTH), torch.ones(WIDTH)

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-3).sqrt()
        return functional.dropout(h, 0.3, self.training)


class Mixup(Body):
    """Mixes each record with another one of its batch."""

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        return 0.5 * (h + h[torch.randperm(len(h))])


def hardest_losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the losses of the harder half; the others count for nothing."""
    losses = class_losses(output, target)
    return torch.where(losses >= losses.median(), losses, 0.0)


class RunningCentre(Body):
    """Keeps a running centre as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = torch.zeros(WIDTH)

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        centred = h - self.centre
        self.centre = 0.5 * self.centre + 0.5 * h.detach().mean(0)
        return centred


class AttentionAcross(Body):
    """Records attend to each other."""

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        return h + torch.softmax(h @ h.t(), -1) @ h


class SortedFeatures(Body):
    """Sorts each feature over the batch."""

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        return h.sort(0).values


class RunningBuffer(Body):
    """Updates a buffer in place."""

    centre: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(WIDTH))

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        self.centre.mul_(0.5).add_(0.5 * h.detach().mean(0))
        return h - self.centre


class _Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, h: torch.Tensor) -> torch.Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
        return 3.0 * gradients[0] - gradients[0].mean(0)


class CentredBackward(Body):
    """Couples records on the way back only."""

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        return _Centred.apply(h)  # type: ignore[no-untyped-call, no-any-return]


def balanced_losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Weigh each record by how rare its class is in the batch."""
    same = (target.unsqueeze(0) == target.unsqueeze(1)).float().sum(1)
    return class_losses(output, target) * len(target) / same


MEMORY: list[torch.Tensor] = []


class MemoryBank(Body):
    """Remembers what it saw in a list of its module."""

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        MEMORY.append(h.detach().mean(0))
        return h - MEMORY[0]


class CumulativeSum(Body):
    """Adds each record's values to those behind it."""

    def mixed(self, h: torch.Tensor) -> torch.Tensor:
        return h.cumsum(0)


def hooked() -> nn.Module:
    """Return a sequence whose layer has a hook that subtracts the batch's mean."""
    model = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    model[0].register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    return model


class RowsAsRecords(nn.Module):
    """Normalises over the first dimension of a flattened view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(torch.nn.functional.group_norm(h.t().unsqueeze(0), 1).squeeze(0).t())  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "gate on the batch's mean": (GateOnBatchMean, class_losses),
    "statistics from eight records on": (StatisticsFromEight, class_losses),
    "batch norm by hand": (HandMadeBatchNorm, class_losses),
    "mixup": (Mixup, class_losses),
    "hardest examples": (Body, hardest_losses),
    "running centre": (RunningCentre, class_losses),
    "attention across records": (AttentionAcross, class_losses),
    "sorted features": (SortedFeatures, class_losses),
    "running buffer": (RunningBuffer, class_losses),
    "coupled backward pass": (CentredBackward, class_losses),
    "balanced losses": (Body, balanced_losses),
    "memory bank": (MemoryBank, class_losses),
    "cumulative sum": (CumulativeSum, class_losses),
    "hook": (hooked, class_losses),
    "rows as records": (RowsAsRecords, class_losses),
}
REFUSED = {
    "batch norm by hand": "attribute mean of the model",
    "mixup": "randperm",
    "running centre": "attribute centre of the model",
    "running buffer": "buffer centre",
    "memory bank": "global MEMORY",
}
"""By what they are refused; the others train alone."""
