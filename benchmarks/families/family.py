"""What a family of models is to the zoo: how to build one, what its records are, and its loss of each record.

It must not know who trains it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fedray.data.inputs import Inputs
from fedray.tasks.classification import cross_entropy

Records = tuple[Inputs, torch.Tensor]
class_losses = cross_entropy  # fedray's default
NUM_CLASSES = 10
IGNORED = -100  # a target that torch's cross-entropy leaves out


@dataclass(frozen=True, kw_only=True)
class Bars:
    """What the issue asks of a family; None where it asks for nothing.

    Args:
        over_hooks: fedray's samples/s over those of Opacus with hooks, where Opacus runs.
        of_plain: fedray's samples/s as a share of those of training without privacy on one large batch.
    """

    over_hooks: float = 2.0
    of_plain: float | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model of the zoo.

    Args:
        title: What tables call it.
        build: Returns the model, randomly initialised.
        records: Draws so many records from a generator.
        loss: Maps (output, target) to one value a record.
        local_steps: Steps of a gateway's round, more where steps are short.
        shared_batch: Records of the batch that is trained on without privacy.
        draws: Whether the model draws at random when it is trained (Dropout).
        needs: Packages beyond fedray's own.
        bars: The issue's.
    """

    title: str
    build: Callable[[], nn.Module]
    records: Callable[[int, torch.Generator], Records]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    local_steps: int = 4
    shared_batch: int = 512
    draws: bool = False
    needs: tuple[str, ...] = ()
    bars: Bars = Bars()


def token_losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return each record's mean cross-entropy over its tokens, `[n]`, from `[n, tokens, vocabulary]`.

    A target of -100 is left out (masked language models score hidden tokens only); a record without any has loss 0.
    """
    losses = functional.cross_entropy(output.transpose(1, 2), target, reduction="none", ignore_index=IGNORED)
    return losses.sum(1) / (target != IGNORED).sum(1).clamp(min=1)


def measurements(*shape: int) -> Callable[[int, torch.Generator], Records]:
    """Return a source of records with normal x of this shape and one of ten classes."""

    def draw(number: int, generator: torch.Generator) -> Records:
        return torch.randn(number, *shape, generator=generator), labels(number, generator)

    return draw


def tokens(length: int, vocabulary: int) -> Callable[[int, torch.Generator], Records]:
    """Return a source of records with token numbers and one of ten classes."""

    def draw(number: int, generator: torch.Generator) -> Records:
        return torch.randint(vocabulary, (number, length), generator=generator), labels(number, generator)

    return draw


def labels(number: int, generator: torch.Generator) -> torch.Tensor:
    """Draw class indices."""
    return torch.randint(NUM_CLASSES, (number,), generator=generator)


def call(model: nn.Module, x: Inputs) -> torch.Tensor:
    """Return the model's output for records: `model(x)`, `model(*x)` or `model(**x)`; of an output object, its logits."""
    output = model(x) if isinstance(x, torch.Tensor) else model(*x) if isinstance(x, tuple) else model(**x)
    return output if isinstance(output, torch.Tensor) else output.logits  # Hugging Face's models return objects
