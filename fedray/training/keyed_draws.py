"""Turns Dropout and random numbers into inputs of the program, so that each record gets its own from its key."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedray.training.rewriting import Rewriter


def feature_dropout(rewriter: Rewriter, x: torch.Tensor, rate: float, train: bool) -> torch.Tensor:
    """Dropout of whole channels (Dropout1d to Dropout3d)."""
    return rewriter.dropout(x, rate, train, [*x.shape[:2], *([1] * (x.dim() - 2))])


def alpha_dropout(rewriter: Rewriter, x: torch.Tensor, rate: float, train: bool) -> torch.Tensor:
    """Dropout that keeps mean and variance of SELU's outputs (Klambauer et al. 2017, section 3)."""
    if not train or rate == 0:
        return x
    alpha = -1.7580993408473766
    scale = 1.0 / math.sqrt((alpha * alpha * rate + 1.0) * (1.0 - rate))
    keep = rewriter.draw("uniform", x.shape) >= rate
    return torch.where(keep, x, alpha) * scale - scale * alpha * rate


def in_place(rule: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a rule that writes another rule's result over its input."""

    def run(rewriter: Rewriter, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return x.copy_(rule(rewriter, x, *arguments))

    return run


def rand(law: str) -> Callable[..., torch.Tensor]:
    """Return the rule of torch.rand or torch.randn, given the law "uniform" or "normal"."""

    def run(rewriter: Rewriter, size: Sequence[int], **named: Any) -> torch.Tensor:
        dtype = named.get("dtype") or torch.get_default_dtype()
        return rewriter.draw(law, size).to(dtype)

    return run


def rand_like(law: str) -> Callable[..., torch.Tensor]:
    """Return the rule of torch.rand_like or torch.randn_like, given the law."""

    def run(rewriter: Rewriter, x: torch.Tensor, **named: Any) -> torch.Tensor:
        return rewriter.draw(law, x.shape).to(named.get("dtype") or x.dtype)

    return run


def bernoulli(rewriter: Rewriter, x: torch.Tensor, *_p: Any) -> torch.Tensor:
    """Ones with the probabilities in x."""
    return (rewriter.draw("uniform", x.shape) >= 1 - x).to(x.dtype)


def bernoulli_p(rewriter: Rewriter, x: torch.Tensor, rate: float = 0.5, **_named: Any) -> torch.Tensor:
    """Ones of x's shape with one probability."""
    return (rewriter.draw("uniform", x.shape) >= 1 - rate).to(x.dtype)


def bernoulli_in_place(rewriter: Rewriter, x: torch.Tensor, rate: float = 0.5, **_named: Any) -> torch.Tensor:
    """Tensor.bernoulli_ with one probability."""
    return x.copy_((rewriter.draw("uniform", x.shape) >= 1 - rate).to(x.dtype))


def uniform_in_place(
    rewriter: Rewriter, x: torch.Tensor, low: float = 0.0, high: float = 1.0, **_named: Any
) -> torch.Tensor:
    """Tensor.uniform_."""
    return x.copy_(low + (high - low) * rewriter.draw("uniform", x.shape))


def normal_in_place(
    rewriter: Rewriter, x: torch.Tensor, mean: float = 0.0, std: float = 1.0, **_named: Any
) -> torch.Tensor:
    """Tensor.normal_."""
    return x.copy_(mean + std * rewriter.draw("normal", x.shape))
