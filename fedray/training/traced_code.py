"""The user's model and loss as one function of flat lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedray.data.inputs import Inputs, leaves, rebuilt
from fedray.models.calls import call_model
from fedray.tasks.own_loss import Loss
from fedray.training.program import Untraceable


@dataclass(frozen=True, kw_only=True)
class Example:
    """A record and its target that a trace is made from: only shapes and types count, never values.

    Args:
        x: One record, with a batch dimension of 1.
        y: Its target, likewise.
    """

    x: Inputs
    y: torch.Tensor


class TracedCode:
    """The user's model and loss as one function of flat lists of tensors."""

    def __init__(self, model: nn.Module, loss: Loss, example: Example) -> None:
        named = dict(model.named_parameters())
        self.trainable = [name for name, parameter in named.items() if parameter.requires_grad]
        self.params = [named[name].detach() for name in self.trainable]
        frozen = {name: p.detach() for name, p in named.items() if not p.requires_grad}
        self.held = frozen | {name: buffer.detach() for name, buffer in model.named_buffers()}
        self.labels = [f"{'parameter' if name in frozen else 'buffer'} {name}" for name in self.held]
        self._model, self._loss, self._example = model, loss, example
        self.inputs = leaves(example.x)

    def losses(
        self, params: Sequence[torch.Tensor], held: Sequence[torch.Tensor], x: Sequence[torch.Tensor], y: Any
    ) -> torch.Tensor:
        """Return the record's loss `[1]`."""
        state = dict(zip(self.trainable, params, strict=True)) | dict(zip(self.held, held, strict=True))
        output = call_model(self._model, rebuilt(self._example.x, x), state)
        found = self._loss(output, y)
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise Untraceable(f"the loss of one record is {shape}; it must be one value a record, [n] for n records")
        return found.reshape(1)


def attribute_of(module: nn.Module, path: str) -> Any:
    """Return what a dotted path names in a module."""
    found: Any = module
    for word in path.split("."):
        found = getattr(found, word)
    return found
