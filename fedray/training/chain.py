"""Runs models that are a plain sequence of stacked layers and activations without autograd.

With few gateways a step's time goes into its calls, and a quarter of those would be autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fedray.training.layers.layer import StackedLayer, Unsupported


class Part(Protocol):
    """One layer or activation of the sequence."""

    def grouped_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output `[G, B, …]` for the input `[G, B, …]`, and keep what the part's gradient will need."""
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
    """A sequence of layers and activations that gives autograd's outputs and gradients bit for bit.

    Args:
        parts: In order.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        first = next((i for i, part in enumerate(parts) if isinstance(part, StackedLayer) and part.slots), len(parts))
        self._parts = parts
        self._back = [(part, index > first) for index, part in enumerate(parts) if index >= first][::-1]

    @classmethod
    def of(cls, module: nn.Module) -> Chain:
        """Return a stacked model as a chain.

        Raises:
            Unsupported: The model is no such sequence; the message names the part that is not proven.
        """
        parts: list[Part] = []
        if _has_any_global_hook():  # type: ignore[no-untyped-call]  # torch lacks the annotation
            raise Unsupported("hooks are set on all modules")
        _collect(module, "", parts)
        return cls(parts)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output `[G, B, …]` for the input `[G, B, …]`."""
        for part in self._parts:
            x = part.grouped_forward(x)
        return x

    def differentiate(self, gradient: torch.Tensor) -> None:
        """Propagate the gradient at the outputs `[G, B, …]` back; layers keep what their own gradients need."""
        e: torch.Tensor | None = gradient
        for part, input_needed in self._back:
            assert e is not None, "only what has no layers before it has no input gradient"
            e = part.grouped_backward(e, input_needed)


def cross_entropy_gradient(output: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the gradient of sum(weights · losses) at outputs `[G, B, K]`: softmax minus the target.

    torch's own log_softmax is slow on few classes: with its backward pass it takes three times as long. With classes
    first it would be quick, but rounding would depend on a record's place in the batch.
    """
    found = (output - output.amax(2, keepdim=True)).exp_()
    found *= (weights / found.sum(2)).unsqueeze(2)
    found.scatter_add_(2, y.unsqueeze(2), -weights.unsqueeze(2))
    return found


def is_customised(module: nn.Module) -> bool:
    """Tell whether hooks or replaced methods make a module do more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or any(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())


def _collect(module: nn.Module | None, name: str, parts: list[Part]) -> None:
    """Add a module's parts, or raise Unsupported."""
    label = f"{name or 'the model'} ({type(module).__name__})"
    if module is None or is_customised(module):
        raise Unsupported(f"{label} has hooks or a forward of its own")
    kind = type(module)
    if isinstance(module, StackedLayer):
        if any(part is module for part in parts):
            raise Unsupported(f"{label} runs more than once")
        parts.append(module)
    elif kind is nn.Sequential:
        # Not children(), which leaves out a module's second use.
        for child_name, child in module._modules.items():
            _collect(child, f"{name}.{child_name}" if name else child_name, parts)
    elif isinstance(module, nn.Flatten) and kind is nn.Flatten and module.start_dim > 0:
        parts.append(_Flatten(module))
    elif kind is nn.ReLU:
        parts.append(_ReLU())
    elif kind is nn.Tanh:
        parts.append(_Tanh())
    else:
        raise Unsupported(f"{label} is not on the list of proven parts")
