"""Layers that multiply rows by a matrix and add a bias."""

from __future__ import annotations

import torch

from fedray.privacy.clipping import selected
from fedray.training.layers.layer import StackedLayer, squares_of, times_factors


def _exact_squares(values: torch.Tensor) -> torch.Tensor:
    """Return sums of squares in float64 throughout: multiplied later, a tiny one times a huge one counts."""
    norms: torch.Tensor = torch.linalg.vector_norm(values, dim=2, dtype=torch.float64)
    return norms.square_()


class Affine(StackedLayer):
    """y = x Wᵀ + b on rows: Linear, and convolutions after unfolding. a `[G, B(, T), in]`, e `[G, B(, T), out]`."""

    gradients: torch.Tensor | None = None
    lengths: torch.Tensor | None = None  # of e, where gradients are products that are never made

    def rows_forward(self, a: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return a Wᵀ + b for a `[G, B(, T), in]`, Wᵀ `[G, in, out]` and b `[G, 1, out]`, keeping a."""
        self.a = a
        rows = a if a.dim() == 3 else a.flatten(1, -2)
        out = torch.bmm(rows, columns) if bias is None else torch.baddbmm(bias, rows, columns)
        return out.view(*a.shape[:-1], -1)

    def rows_backward(self, e: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return e W `[G, B, T, in]` for a sequence."""
        return torch.bmm(e.flatten(1, -2), weight).view(*e.shape[:-1], -1)

    def squared_norms(self) -> torch.Tensor:
        """See `StackedLayer.squared_norms`.

        Without a sequence the norm is |e|²(|a|² + 1) exactly. With one, the gradients themselves are made, and summed
        later: the norm from products of positions (Gram matrices) would lose gradients that nearly cancel, and a record
        whose norm is underestimated is not clipped.
        """
        if self.a.dim() == 3:
            inputs = _exact_squares(self.a) if self.has("weight") else torch.zeros((), dtype=torch.float64)
            squares = _exact_squares(self.e)
            self.lengths = squares.sqrt()
            return squares.mul_(inputs + 1 if self.has("bias") else inputs)
        squares = torch.zeros((), dtype=torch.float64, device=self.e.device)
        if self.has("weight"):
            e, a = self.e.flatten(0, 1), self.a.flatten(0, 1)
            self.gradients = torch.bmm(e.transpose(1, 2), a).flatten(1).view(*self.a.shape[:2], -1)
            squares = squares + squares_of(self.gradients)
        if self.has("bias"):
            squares = squares + squares_of(self.e.sum(2))
        return squares

    def select(self, keep: torch.Tensor) -> None:
        """See `StackedLayer.select`."""
        super().select(keep)
        if self.gradients is not None:
            self.gradients = selected(self.gradients, keep)

    def forget(self) -> None:
        """See `StackedLayer.forget`."""
        super().forget()
        self.gradients = self.lengths = None

    def weight_sum(self, factors: torch.Tensor | None) -> torch.Tensor:
        """Return the weighted sum of the weight's gradients `[G, out, in]`."""
        if self.gradients is not None and factors is not None:
            return torch.bmm(factors.unsqueeze(1), self.gradients).view(len(factors), self.e.shape[-1], -1)
        weighted = times_factors(self.e, factors)
        return torch.bmm(weighted.flatten(1, -2).transpose(1, 2), self.a.flatten(1, -2))

    def bias_sum(self, factors: torch.Tensor | None) -> torch.Tensor:
        """Return the weighted sum of the bias' gradients `[G, out]`."""
        gradients = self.e.sum(2)
        return gradients.sum(1) if factors is None else torch.bmm(factors.unsqueeze(1), gradients).squeeze(1)

    def add_sums(self, out: torch.Tensor, factors: torch.Tensor | None) -> None:
        """See `StackedLayer.add_sums`."""
        targets = self.targets(out)
        if self.has("weight"):
            target = targets["weight"]
            target += self.weight_sum(factors).view(target.shape)
        if self.has("bias"):
            target = targets["bias"]
            target += self.bias_sum(factors).view(target.shape)
