"""Models that are a plain sequence of stacked layers and activations: they run without autograd, but for the loss.

With few gateways a step costs what its calls cost, and autograd's are a quarter of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fedray.models import Loss, cross_entropy
from fedray.training.layers import StackedLayer


class Part(Protocol):
    """One step of the sequence."""

    def grouped_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output `[G, B, …]` for the input `[G, B, …]`, and keep what the gradient will need."""
        ...

    def grouped_backward(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """Take the output gradient; return the input gradient, of the input's shape, when it is needed."""
        ...


class _Flatten:
    """nn.Flatten; records have one more dimension before them here."""

    def __init__(self, module: nn.Flatten) -> None:
        self._start, self._end = (dim + 1 if dim > 0 else dim for dim in (module.start_dim, module.end_dim))

    def grouped_forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `Part.grouped_forward`."""
        self._shape = x.shape
        return x.flatten(self._start, self._end)

    def grouped_backward(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `Part.grouped_backward`."""
        return e.reshape(self._shape)


class _ReLU:
    """nn.ReLU, never in place: the first part's input is the data."""

    def grouped_forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `Part.grouped_forward`."""
        self._output = torch.relu(x)
        return self._output

    def grouped_backward(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `Part.grouped_backward`."""
        found: torch.Tensor = torch.ops.aten.threshold_backward.default(e, self._output, 0)
        return found


class _Tanh:
    """nn.Tanh."""

    def grouped_forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `Part.grouped_forward`."""
        self._output = torch.tanh(x)
        return self._output

    def grouped_backward(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `Part.grouped_backward`."""
        found: torch.Tensor = torch.ops.aten.tanh_backward.default(e, self._output)
        return found


class Chain:
    """A sequence of parts, with autograd's results bit for bit; the default loss' gradient agrees to rounding.

    Args:
        parts: In order.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        first = next((i for i, part in enumerate(parts) if isinstance(part, StackedLayer)), len(parts))
        self._parts = parts
        self._back = [(part, index > first) for index, part in enumerate(parts) if index >= first][::-1]

    @classmethod
    def of(cls, module: nn.Module) -> Chain | None:
        """Return the chain that a stacked model is, or None when it is none (its own forward code, hooks, …)."""
        parts: list[Part] = []
        if _has_any_global_hook():  # type: ignore[no-untyped-call]  # torch lacks the annotation
            return None
        return cls(parts) if _collect(module, parts) else None

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output `[G, B, …]` for the input `[G, B, …]`."""
        for part in self._parts:
            x = part.grouped_forward(x)
        return x

    def differentiate(self, loss: Loss, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> None:
        """See `fedray.training.stacking.StackedModel.differentiate`."""
        gradient = _loss_gradient(loss, self.compute(x), y, weights)
        for part, input_needed in self._back:
            if gradient is None:  # the loss does not depend on it
                return
            gradient = part.grouped_backward(gradient, input_needed)


def _loss_gradient(loss: Loss, output: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
    """Return the gradient of sum(weights · losses) at the outputs; None when the loss does not depend on them."""
    if loss is cross_entropy and output.dim() == 3 and y.dim() == 2 and y.dtype == torch.int64:
        # The default loss at class indices: softmax minus the target. By torch's log_softmax, which is slow on few
        # classes, and its backward pass it takes three times as long; with classes first, which would be quick, rounding
        # depends on a record's place in the batch.
        found = (output - output.amax(2, keepdim=True)).exp_()
        found *= (weights / found.sum(2)).unsqueeze(2)
        found.scatter_add_(2, y.unsqueeze(2), -weights.unsqueeze(2))
        return found
    # Copies are no tensors of the inference mode, which autograd refuses; and the user's loss may work in place.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = output.flatten(0, 1).clone().requires_grad_()
        total = weighted(loss(leaf.clone(), y.flatten(0, 1).clone()), weights.flatten().clone())
    gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0]
    return None if gradient is None else gradient.reshape(output.shape)


def weighted(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of weights · losses `[]`, both `[n]`: asked for the gradient of more than one value, autograd would
    first import a third of a second of things that it then does not use."""
    return torch.dot(losses, weights.to(losses.dtype))


def altered(module: nn.Module) -> bool:
    """Tell whether a module does more when it is called than its class says: by hooks, or a forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _collect(module: nn.Module | None, parts: list[Part]) -> bool:
    if module is None or altered(module):
        return False
    kind = type(module)
    if isinstance(module, StackedLayer):
        if kind.forward is not StackedLayer.forward:  # norms do more than `compute`, under autograd
            return False
        parts.append(module)
    elif kind is nn.Sequential:
        # Not children(), which leaves out a module's second use.
        return all(_collect(child, parts) for child in module._modules.values())
    elif isinstance(module, nn.Flatten) and kind is nn.Flatten and module.start_dim != 0:
        parts.append(_Flatten(module))
    elif kind is nn.ReLU:
        parts.append(_ReLU())
    elif kind is nn.Tanh:
        parts.append(_Tanh())
    else:
        return False
    return True
