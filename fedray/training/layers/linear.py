"""nn.Linear, with faster norms and sums for models that have no other trainable layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fedray.privacy.clipping import factors_of_products, row_norms
from fedray.training.layers.affine import Affine
from fedray.training.layers.layer import Slot, StackedLayer

_LARGEST_FACTOR = 1e8  # of a gradient's norm that is computed in float32


class StackedLinear(Affine):
    """nn.Linear, with or without a sequence dimension."""

    def bind(self, params: torch.Tensor) -> None:
        """See `StackedLayer.bind`."""
        super().bind(params)
        bias = self.value("bias")
        self._columns = self._values["weight"].transpose(1, 2)
        self._bias = None if bias is None else bias.unsqueeze(1)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """See `StackedLayer.compute`."""
        a = self.grouped(x)
        if a.dim() > 4:
            a = a.flatten(2, -2)
        out = self.rows_forward(a, self._columns, self._bias)
        return out.view(*x.shape[:-1], -1)

    def backpropagate(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `StackedLayer.backpropagate`."""
        if self.a.dim() == 3:
            self.e = e.reshape(self._gateways, -1, e.shape[1])
            return torch.bmm(self.e, self._values["weight"]).flatten(0, 1) if input_needed else None
        self.e = e.reshape(*self.a.shape[:-1], e.shape[-1])
        return self.rows_backward(self.e, self._values["weight"]) if input_needed else None

    def grouped_forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `StackedLayer.grouped_forward`."""
        if x.dim() != 3:
            return super().grouped_forward(x)
        self.a = x  # the usual case, in as few calls as can be
        out = torch.bmm(x, self._columns) if self._bias is None else torch.baddbmm(self._bias, x, self._columns)
        self.num_values = x.numel() + out.numel()
        return out

    def grouped_backward(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `StackedLayer.grouped_backward`."""
        if e.dim() != 3:
            return super().grouped_backward(e, input_needed)
        self.e = e
        return torch.bmm(e, self._values["weight"]) if input_needed else None

    @property
    def factored(self) -> bool:
        """See `StackedLayer.factored`."""
        return len(self.slots) == 2 and self.a.dim() == 3

    def add_sums(self, out: torch.Tensor, factors: torch.Tensor | None) -> None:
        """See `StackedLayer.add_sums`.

        The products get memory of their own: torch would make those that go into rows of `out` one gateway at a time.
        """
        if self.a.dim() != 3:
            super().add_sums(out, factors)
            return
        targets = self.targets(out)
        if factors is not None and self.lengths is not None:
            factors = factors_of_products(self.lengths, factors)
        weighted = self.e if factors is None else self.e * factors.unsqueeze(2)
        if self.has("weight"):
            targets["weight"].add_(torch.bmm(weighted.transpose(1, 2), self.a))
        if self.has("bias"):
            targets["bias"].add_(weighted.sum(1))


def quick_norms(
    layers: Sequence[StackedLayer], shape: torch.Size, clip_norm: float
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return the norm of each record's gradient over all layers, `[G, B]`, where all are plain Linear layers.

    From each layer's e and a it is the root of the sum of |e|²(|a|² + 1), in float32 and in few calls.

    Args:
        layers: All that the loss depends on.
        shape: (G, B).
        clip_norm: C.

    Returns:
        None where other layers or shapes take part. Else the norms, and a mask `[G]` of the gateways for which they
        hold, None for all: one gateway's records must not decide how another's are added up. They hold as long as
        float32 loses nothing that counts. What it loses are values below 1.1e-19, whose squares it cannot hold: beside
        inputs of at most 1e8·C, and the bias' input of 1 where C is at least 1e-8, 10^8 of them are no more than 2e-7 of C.
        Every norm that holds is usable: of up to 1000 layers at most 4e17.
    """
    if clip_norm < 1 / _LARGEST_FACTOR or not all(layer.factored and layer.a.shape[:2] == shape for layer in layers):
        return None
    factors = torch.stack([row_norms(layer.e) for layer in layers] + [row_norms(layer.a) for layer in layers])
    largest = _LARGEST_FACTOR * min(1.0, clip_norm)
    hold = None if float(factors.max()) <= largest else factors.amax((0, 2)) <= largest  # false for NaN
    e, a = factors.square_().chunk(2)
    # Not sum(0), whose rounding depends on a record's place in the batch.
    first, *others = torch.addcmul(e, e, a).unbind()
    return functools.reduce(torch.Tensor.add_, others, first).sqrt_(), hold


def quick_sums(layers: Sequence[StackedLayer], factors: torch.Tensor) -> torch.Tensor:
    """Return the sums over records of factor · gradient `[G, P]` for layers whose `quick_norms` hold.

    Args:
        layers: Whose parameters, one layer after the other, are the P columns.
        factors: `[G, B]`.
    """
    columns, factors = [], factors.unsqueeze(2)
    for layer in layers:
        weighted = layer.e * factors
        sums = {"weight": torch.bmm(weighted.transpose(1, 2), layer.a).flatten(1), "bias": weighted.sum(1)}
        columns += [sums[name] for name in layer.slots]
    return torch.cat(columns, 1)


def stacked_linear(module: nn.Linear, slots: Mapping[str, Slot], frozen: Mapping[str, torch.Tensor]) -> StackedLayer:
    """Return the stacked layer of nn.Linear."""
    return StackedLinear(slots, frozen)
