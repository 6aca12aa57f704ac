"""The perceptron that odd parts stand in front of, and the lists that they are registered in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

WIDTH, CLASSES = 6, 3
Part = Callable[["Odd", torch.Tensor], torch.Tensor]


class Odd(nn.Module):
    """A perceptron with an odd part in front of it.

    Args:
        part: Maps a batch's inputs `[n, 6]` to as many.
        extra: Modules and tensors that it uses.
    """

    def __init__(self, part: Part, extra: dict[str, Callable[[], object]]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.tokens, self.scale = nn.Parameter(torch.randn(1, 4, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.constant = torch.randn(1, 4, WIDTH)
        self.part = part
        for name, make in extra.items():
            value = make()
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(self.part(self, x))))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], Odd]] = {}
"""What trains, each record alone."""
REFUSED: dict[str, tuple[Callable[[], Odd], str]] = {}
"""What is refused, and words of the reason."""


def trains(name: str, **extra: Callable[[], object]) -> Callable[[Part], Part]:
    """Register a part that trains."""

    def register(part: Part) -> Part:
        MODELS[name] = lambda: Odd(part, extra)
        return part

    return register


def refused(name: str, words: str, **extra: Callable[[], object]) -> Callable[[Part], Part]:
    """Register a part that is refused."""

    def register(part: Part) -> Part:
        REFUSED[name] = (lambda: Odd(part, extra), words)
        return part

    return register


def repeated(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a parameter or constant for each record, without a copy."""
    return value.expand(x.shape[0], *[-1] * (value.dim() - 1))
