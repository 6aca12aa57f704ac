"""How a model is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fedray.data.inputs import Inputs


def call_model(model: nn.Module, x: Inputs, state: dict[str, torch.Tensor] | None = None) -> Any:
    """Run a model on x: a tensor, a tuple of arguments or a dict of named ones; an output with `.logits` gives these.

    Args:
        model: Called as `model(x)`, `model(*x)` or `model(**x)`.
        x: See above.
        state: Parameters and buffers by name, in place of the model's own; None for its own.
    """
    arguments = (x,) if isinstance(x, torch.Tensor) else () if isinstance(x, dict) else x
    named = x if isinstance(x, dict) else {}
    if state is None:
        output = model(*arguments, **named)
    else:
        output = functional_call(model, _by_place(model, state), arguments, named, tie_weights=False)
    if not isinstance(output, torch.Tensor) and isinstance(getattr(output, "logits", None), torch.Tensor):
        return output.logits
    return output


def _by_place(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state by one name for each place that holds a tensor.

    functional_call by itself takes a module that is used twice for two, and puts back what it put in.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    values = {id(tensor): state[name] for name, tensor in tensors.items() if name in state}
    found = {}
    for path, module in model.named_modules():  # each once
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None and id(tensor) in values:
                found[f"{path}.{name}" if path else name] = values[id(tensor)]
    return found
