"""Stacks a model that is a sequence of proven layers to run many gateways at once, or says why it is no such model.

Nothing in such a sequence can couple records: each part is one of ours, and is applied to each record by construction.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from fedray.models.layout import Layout
from fedray.training.chain import Chain, is_customised
from fedray.training.layers.kinds import KINDS
from fedray.training.layers.layer import Slot, StackedLayer, Unsupported


class StackedModel:
    """A sequence of proven parts whose trainable layers are stacked over gateways.

    Args:
        model: Copied.
        device: Where it runs.

    Raises:
        Unsupported: It is no sequence of proven parts; the message says why.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        layout = Layout.of(model)
        slots = {name: Slot(where=where, shape=shape) for name, shape, where in layout.slices()}
        self.num_params = layout.num_params
        self.layers: list[StackedLayer] = []  # those that train
        self._all: list[StackedLayer] = []
        module = self._stack(copy.deepcopy(model).to(device).train(), "", slots, set())
        self.chain = Chain.of(module)

    def bind(self, params: torch.Tensor) -> None:
        """Use `params` `[G, P]` (views of it: it may be updated in place)."""
        for layer in self._all:
            layer.bind(params)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs `[G, B, …]` of records `[G, B, …]`; layers keep what their gradients will need."""
        for layer in self._all:
            layer.forget()
        return self.chain.compute(x)

    def one_output(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the output `[1, …]` of one record `[1, …]`, at zero parameters, and how many values the layers held."""
        self.bind(torch.zeros(1, self.num_params, device=x.device))
        with torch.no_grad():
            output = self.compute(x.unsqueeze(0))
        return output[0], sum(layer.num_values for layer in self._all)

    def used_layers(self) -> list[StackedLayer]:
        """Return the layers that the last backward pass reached; the others have zero gradients."""
        return [layer for layer in self.layers if layer.e is not None]

    def _stack(self, module: nn.Module, name: str, slots: Mapping[str, Slot], seen: set[int]) -> nn.Module:
        own = dict(module.named_parameters(recurse=False))
        label = f"{name or 'the model'} ({type(module).__name__})"
        if not own:
            for child_name, child in module.named_children():
                path = f"{name}.{child_name}" if name else child_name
                setattr(module, child_name, self._stack(child, path, slots, seen))
            return module
        kind = KINDS.get(type(module))
        if kind is None:
            raise Unsupported(f"{label} is not on the list of proven layers")
        if is_customised(module):
            raise Unsupported(f"{label} has hooks or a forward of its own")
        if any(id(p) in seen for p in own.values()):
            raise Unsupported(f"{label} shares a parameter with another layer")
        seen.update(id(p) for p in own.values())
        prefix = f"{name}." if name else ""
        try:
            layer: StackedLayer = kind(
                module,
                {key: slots[prefix + key] for key, p in own.items() if p.requires_grad},
                {key: p.detach() for key, p in own.items() if not p.requires_grad},
            )
        except Unsupported as reason:
            raise Unsupported(f"{label}: {reason}") from None
        self._all.append(layer)
        if layer.slots:
            self.layers.append(layer)
        return layer


def reason_against(model: nn.Module) -> str | None:
    """Say why a model is no sequence of proven parts, or return None when it is; it stays unchanged."""
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            return f"{name} shares its values with another layer"
        seen.add(id(parameter))
    try:
        StackedModel(model, torch.device("cpu"))
    except Unsupported as reason:
        return str(reason)
    return None
