"""What a record's x may be: a tensor, a tuple of tensors or a dict of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Inputs = torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]


def leaves(x: Inputs) -> list[torch.Tensor]:
    """Return the tensors of x, in order."""
    if isinstance(x, torch.Tensor):
        return [x]
    return list(x.values()) if isinstance(x, dict) else list(x)


def rebuilt(like: Inputs, parts: Sequence[Any]) -> Any:
    """Return `parts` in the structure of `like`."""
    if isinstance(like, torch.Tensor):
        return parts[0]
    return dict(zip(like, parts, strict=True)) if isinstance(like, dict) else tuple(parts)
