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

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output and keep what the gradient will need."""
        ...

    def catch(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """Take the output gradient; return the input gradient when it is needed."""
        ...


class _Flatten:
    """nn.Flatten; `Chain` gives gradients the shapes of the values."""

    def __init__(self, module: nn.Flatten) -> None:
        self._module = module

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """See `Part.compute`."""
        return x.flatten(self._module.start_dim, self._module.end_dim)

    def catch(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `Part.catch`."""
        return e


class _ReLU:
    """nn.ReLU, never in place: the first part's input is the data."""

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """See `Part.compute`."""
        self._output = torch.relu(x)
        return self._output

    def catch(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `Part.catch`."""
        found: torch.Tensor = torch.ops.aten.threshold_backward.default(e, self._output, 0)
        return found


class _Tanh:
    """nn.Tanh."""

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """See `Part.compute`."""
        self._output = torch.tanh(x)
        return self._output

    def catch(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `Part.catch`."""
        found: torch.Tensor = torch.ops.aten.tanh_backward.default(e, self._output)
        return found


class Chain:
    """A sequence of parts, with autograd's results bit for bit; the default loss' gradient agrees to rounding.

    Args:
        parts: In order.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._first = next((i for i, part in enumerate(parts) if isinstance(part, StackedLayer)), len(parts))

    @classmethod
    def of(cls, module: nn.Module) -> Chain | None:
        """Return the chain that a stacked model is, or None when it is none (its own forward code, hooks, …)."""
        parts: list[Part] = []
        if _has_any_global_hook():  # type: ignore[no-untyped-call]  # torch lacks the annotation
            return None
        return cls(parts) if _collect(module, parts) else None

    def compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the input, then each part's output."""
        values = [x]
        for part in self._parts:
            values.append(part.compute(values[-1]))
        return values

    def differentiate(self, loss: Loss, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> None:
        """See `fedray.training.stacking.StackedModel.differentiate`."""
        values = self.compute(x)
        gradient = _loss_gradient(loss, values[-1], y, weights)
        for index in range(len(self._parts) - 1, self._first - 1, -1):
            if gradient is None:  # the loss does not depend on it
                return
            gradient = self._parts[index].catch(gradient.reshape(values[index + 1].shape), index > self._first)


def _loss_gradient(loss: Loss, output: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
    """Return the gradient of sum(weights · losses) at the outputs; None when the loss does not depend on them."""
    if loss is cross_entropy and output.dim() == 2 and y.dim() == 1 and y.dtype == torch.int64:
        # The default loss at class indices: softmax minus the target. By torch's log_softmax, which is slow on few
        # classes, and its backward pass it takes three times as long; with classes first, which would be quick, rounding
        # depends on a record's place in the batch.
        found = (output - output.amax(1, keepdim=True)).exp_()
        found *= (weights / found.sum(1)).unsqueeze(1)
        found.scatter_add_(1, y.unsqueeze(1), -weights.unsqueeze(1))
        return found
    # Copies are no tensors of the inference mode, which autograd refuses; and the user's loss may work in place.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = output.clone().requires_grad_()
        total = weighted(loss(leaf.clone(), y.clone()), weights.clone())
    return torch.autograd.grad(total, leaf, allow_unused=True)[0]


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
    elif isinstance(module, nn.Flatten) and kind is nn.Flatten:
        parts.append(_Flatten(module))
    elif kind is nn.ReLU:
        parts.append(_ReLU())
    elif kind is nn.Tanh:
        parts.append(_Tanh())
    else:
        return False
    return True
