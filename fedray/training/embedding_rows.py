"""Adding up what a record's tokens give to the rows of an embedding."""

from __future__ import annotations

import torch


def added_rows(tokens: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Return what each token's row gets in all, at the token's first place, and zeros at its later ones.

    Tokens that occur twice in a record are added up before the norm is taken: gradients that cancel would otherwise be
    small in the norm and large in what is released.

    Args:
        tokens: `[n, S]`.
        e: `[n, S, D]`.

    Returns:
        `[n, S, D]`.
    """
    if tokens.shape[1] == 1:
        return e
    same = tokens.unsqueeze(1) == tokens.unsqueeze(2)
    repeats = same.tril(-1).any(2)
    if not bool(repeats.any()):
        return e
    added = torch.bmm(same.double(), e.double())  # cancelling tokens need the digits
    return torch.where(repeats.unsqueeze(2), 0.0, added).to(e.dtype)
