"""nn.Embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from fedray.training.layers.layer import Slot, StackedLayer, Unsupported, squares_of, times_factors


class StackedEmbedding(StackedLayer):
    """nn.Embedding: a is `[G, B, T]` token indices, e `[G, B, T, D]`."""

    def __init__(
        self, slots: Mapping[str, Slot], frozen: Mapping[str, torch.Tensor], *, padding_index: int | None
    ) -> None:
        super().__init__(slots, frozen)
        self._padding_index = padding_index

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """See `StackedLayer.compute`."""
        weight = self._values["weight"]
        tokens = self.grouped(x).flatten(1)
        self.a = tokens.view(len(tokens), -1, math.prod(x.shape[1:]))
        out = torch.gather(weight, 1, tokens.unsqueeze(2).expand(-1, -1, weight.shape[2]))
        return out.view(*x.shape, weight.shape[2])

    def backpropagate(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `StackedLayer.backpropagate`; token indices have no gradient."""
        self.e = e.reshape(*self.a.shape, e.shape[-1])
        if self._padding_index is not None:
            self.e = torch.where((self.a == self._padding_index).unsqueeze(3), 0.0, self.e)
        return None

    def squared_norms(self) -> torch.Tensor:
        """See `StackedLayer.squared_norms`.

        Tokens that occur twice in a record are added up first, for the norm and for the sum alike: gradients that cancel
        would otherwise be small in the norm and large in what is added onto the noise.
        """
        if self.a.shape[2] > 1:
            tokens = self.a.flatten(0, 1)
            same = tokens.unsqueeze(1) == tokens.unsqueeze(2)
            first = ~same.tril(-1).any(2)
            added = torch.bmm(same.double(), self.e.flatten(0, 1).double())  # cancelling tokens need the digits
            self.e = torch.where(first.unsqueeze(2), added, 0.0).to(self.e.dtype).view_as(self.e)
        return squares_of(self.e)

    def add_sums(self, out: torch.Tensor, factors: torch.Tensor | None) -> None:
        """See `StackedLayer.add_sums`."""
        weighted = times_factors(self.e, factors).flatten(1, 2)
        index = self.a.flatten(1).unsqueeze(2).expand_as(weighted)
        self.targets(out)["weight"].scatter_add_(1, index, weighted)


def stacked_embedding(
    module: nn.Embedding, slots: Mapping[str, Slot], frozen: Mapping[str, torch.Tensor]
) -> StackedLayer:
    """Return the stacked layer of an embedding, or raise Unsupported."""
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise Unsupported("max_norm, scale_grad_by_freq and sparse are not proven")
    return StackedEmbedding(slots, frozen, padding_index=module.padding_idx)
