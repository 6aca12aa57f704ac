"""A layer of many gateways at once, with the book-keeping that per-record clipping needs.

A stacked layer stands in for a leaf layer of the user's model. The model runs on a flat batch of G·B records; the stacked
layer gives each gateway's B records that gateway's own weights. One forward pass keeps the layer's input a, one backward
pass its output gradient e; from these two come each record's squared gradient norm and, once the clipping factors are
known, the clipped sum, without a second backward pass (Goodfellow 2015; Lee and Kifer 2021; Li et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedray.privacy.clipping import row_norms, selected


class Unsupported(Exception):
    """A layer cannot be stacked; the message says which and why."""


def unflatten(values: torch.Tensor, dim: int, *sizes: int) -> torch.Tensor:
    """Return `values` with one dimension split in several (torch's own method lacks annotations)."""
    result: torch.Tensor = values.unflatten(dim, sizes)  # type: ignore[no-untyped-call]  # see above
    return result


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a layer's parameter lies in the flat vector.

    Args:
        where: Slice of the P columns.
        shape: The parameter's shape.
    """

    where: slice
    shape: tuple[int, ...]

    def view(self, stacked: torch.Tensor) -> torch.Tensor:
        """Return the parameter's view `[G, *shape]` of a `[G, P]` matrix."""
        return unflatten(stacked[:, self.where], 1, *self.shape)


class StackedLayer(nn.Module):
    """One leaf layer of G gateways.

    Args:
        slots: Trainable parameters by local name ("weight", "bias").
        frozen: Other parameters by local name, shared by all gateways.
    """

    def __init__(self, slots: Mapping[str, Slot], frozen: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.slots = dict(slots)
        self.frozen = dict(frozen)
        self.num_values = 0
        self._values: dict[str, torch.Tensor] = {}
        self._targets: dict[str, torch.Tensor] = {}
        self._target_of: torch.Tensor | None = None
        self._gateways = 0
        self._shape = torch.Size()
        self.a: Any = None
        self.e: Any = None

    # It holds no modules or parameters, and torch's look-out for them would take a tenth of a step's time.
    __setattr__ = object.__setattr__  # type: ignore[assignment]  # narrower than torch says

    def bind(self, params: torch.Tensor) -> None:
        """Take this layer's parameters from `params` `[G, P]` from now on (views: they follow the optimizer)."""
        self._gateways = len(params)
        self._target_of = None
        self._values = {name: slot.view(params) for name, slot in self.slots.items()}
        for name, value in self.frozen.items():
            self._values[name] = value.expand(len(params), *value.shape)

    def value(self, name: str) -> torch.Tensor | None:
        """Return a parameter `[G, …]`, or None when the layer has none of that name."""
        return self._values.get(name)

    def has(self, name: str) -> bool:
        """Tell whether a parameter is trainable."""
        return name in self.slots

    def targets(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return each trainable parameter's view of `out` `[G, P]`; views are made once for a matrix."""
        if self._target_of is not out:
            self._target_of = out
            self._targets = {name: slot.view(out) for name, slot in self.slots.items()}
        return self._targets

    def grouped(self, flat: torch.Tensor) -> torch.Tensor:
        """Return `[G·B, …]` as `[G, B, …]`."""
        return flat.view(self._gateways, -1, *flat.shape[1:])

    def forget(self) -> None:
        """Drop the input and gradient that the last step kept."""
        self.a = self.e = None

    @property
    def factored(self) -> bool:
        """Whether each record's gradient is one outer product e aᵀ, of a weight, beside e, of a bias."""
        return False

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output and keep what the gradients will need."""
        raise NotImplementedError

    def backpropagate(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """Keep the output gradient; return the input gradient when it is needed."""
        raise NotImplementedError

    def grouped_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run `compute` on gateways' records side by side: `[G, B, …]` to `[G, B, …]`."""
        self._shape = x.shape
        out = self.compute(x.flatten(0, 1))
        self.num_values = self.a.numel() + out.numel()
        return self.grouped(out)

    def grouped_backward(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """Run `backpropagate` on the gradient of such an output."""
        found = self.backpropagate(e.flatten(0, 1), input_needed)
        return None if found is None else found.reshape(self._shape)

    def squared_norms(self) -> torch.Tensor:
        """Return the squared norm of each record's gradient in this layer, `[G, B]`."""
        raise NotImplementedError

    def select(self, keep: torch.Tensor) -> None:
        """Zero what was kept of records outside the mask `keep` `[G, B]` (a factor of 0 would leave NaN)."""
        self.a, self.e = (selected(part, keep) if part.is_floating_point() else part for part in (self.a, self.e))

    def add_sums(self, out: torch.Tensor, factors: torch.Tensor | None) -> None:
        """Add the sum over records of factor · gradient to `out` `[G, P]`; factors `[G, B]`, or None for 1."""
        raise NotImplementedError


def times_factors(e: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """Return `[G, B, …]` with each record scaled by its factor `[G, B]`; unchanged for None."""
    return e if factors is None else e * factors.view(*factors.shape, *([1] * (e.dim() - 2)))


def squares_of(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of gradients over all but the first two dimensions, in float64."""
    return row_norms(values if values.dim() == 3 else values.flatten(2)).square_()
