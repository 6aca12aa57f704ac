"""Turning a user's model into one that runs many gateways at once, or saying why that is not proven to be right."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from fedray.models import Loss
from fedray.params import Layout
from fedray.streams import forked_global_rng
from fedray.training.chain import Chain, altered, weighted
from fedray.training.layers import DRAWING, KINDS, Slot, StackedLayer, Unsupported
from fedray.training.trainer import NOT_THE_BATCH


class StackedModel:
    """A model whose trainable leaf layers are stacked over gateways; the rest of its code runs as it is.

    The user's forward sees a flat batch of G·B records, which it treats as one batch: records are independent.

    Args:
        model: Copied.
        device: Where it runs.

    Raises:
        Unsupported: A layer or parameter is not on the proven list; the message names it.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        layout = Layout.of(model)
        slots = {name: Slot(where=where, shape=shape) for name, shape, where in layout.slices()}
        self.num_params = layout.num_params
        self.layers: list[StackedLayer] = []
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self.module = self._stack(copy.deepcopy(model).to(device).train(), "", slots, set())
        self.chain = Chain.of(self.module)

    def bind(self, params: torch.Tensor) -> None:
        """Use `params` `[G, P]` (views of it: it may be updated in place)."""
        for layer in self.layers:
            layer.bind(params, self._anchor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the flat batch `[G·B, …]`."""
        for layer in self.layers:
            layer.forget()
        return self.module(x)  # type: ignore[no-any-return]  # a module's call is untyped

    def differentiate(self, loss: Loss, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> None:
        """Catch every layer's output gradient of sum(weights · losses).

        Args:
            loss: Maps (outputs `[G·B, …]`, y) to losses `[G·B]`.
            x: `[G, B, …]`.
            y: `[G, B, …]`.
            weights: `[G, B]`.
        """
        if self.chain is None:
            with torch.enable_grad():
                total = weighted(loss(self.forward(x.flatten(0, 1)), y.flatten(0, 1)), weights.flatten())
            torch.autograd.grad(total, self._anchor, allow_unused=True)
            return
        for layer in self.layers:
            layer.forget()
        self.chain.differentiate(loss, x, y, weights)

    def used_layers(self) -> list[StackedLayer]:
        """Return the layers that the last backward pass reached; the others have zero gradients."""
        return [layer for layer in self.layers if layer.e is not None]

    def _stack(self, module: nn.Module, name: str, slots: Mapping[str, Slot], seen: set[int]) -> nn.Module:
        own = dict(module.named_parameters(recurse=False))
        label = f"{name or 'the model'} ({type(module).__name__})"
        trainable = {key: p for key, p in own.items() if p.requires_grad}
        if isinstance(module, DRAWING):
            raise Unsupported(f"{label} draws random numbers")
        if not trainable:
            for child_name, child in module.named_children():
                path = f"{name}.{child_name}" if name else child_name
                setattr(module, child_name, self._stack(child, path, slots, seen))
            return module
        kind = KINDS.get(type(module))
        if kind is None:
            raise Unsupported(f"{label} is not on the list of proven layers")
        if altered(module):
            raise Unsupported(f"{label} has hooks or a forward of its own")
        if any(id(p) in seen for p in own.values()):
            raise Unsupported(f"{label} shares a parameter with another layer")
        seen.update(id(p) for p in own.values())
        prefix = f"{name}." if name else ""
        try:
            layer: StackedLayer = kind(
                module,
                {key: slots[prefix + key] for key in trainable},
                {key: p.detach() for key, p in own.items() if not p.requires_grad},
            )
        except Unsupported as reason:
            raise Unsupported(f"{label}: {reason}") from None
        self.layers.append(layer)
        return layer


def reason_against(model: nn.Module, x: torch.Tensor) -> str | None:
    """Say why a model cannot be stacked, or return None when it can.

    Besides the list of layers, the stacked model must give the original's outputs on a few records, and use no layer
    twice.

    Args:
        model: Stays unchanged.
        x: `[n, …]`, a few records.
    """
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            return f"{name} shares its values with another layer"
        seen.add(id(parameter))
    plain = copy.deepcopy(model).train()
    # Two gateways with the same weights must give what one model gives, for two batch sizes: a layer whose first
    # dimension is something else may have the size of one of them.
    reason = None
    for num_records in (4, 6):
        reason = reason or _reason_in_a_pass(model, plain, torch.cat([x] * 6)[:num_records])
    return reason


def _reason_in_a_pass(model: nn.Module, plain: nn.Module, x: torch.Tensor) -> str | None:  # noqa: PLR0911 - one return a reason
    try:
        stacked = StackedModel(model, torch.device("cpu"))
        flat = torch.from_numpy(Layout.of(model).flatten(model))
        stacked.bind(flat.expand(2, -1))
        with torch.no_grad(), forked_global_rng(0):
            expected = plain(x)
        with torch.no_grad(), forked_global_rng(1):
            again = plain(x)
            found = stacked.forward(x)
            rows = [layer.a.shape[1] for layer in stacked.layers if layer.a is not None]
            outputs = [found]
            if stacked.chain is not None:
                outputs.append(stacked.chain.compute(x.view(2, -1, *x.shape[1:])).flatten(0, 1))
    except Unsupported as reason:
        return str(reason)
    except Exception as error:  # the user's forward may do anything with the layers it finds
        return f"its forward pass does not run on stacked layers ({type(error).__name__}: {error})"
    repeated = [layer for layer in stacked.layers if layer.calls > 1]
    if repeated:
        return f"a layer ({type(repeated[0]).__name__}) runs more than once in a forward pass"
    if not torch.equal(expected, again):
        return "its forward pass draws random numbers"
    if any(num_rows != len(x) // 2 for num_rows in rows):
        return NOT_THE_BATCH
    if not all(torch.allclose(expected, output, rtol=1e-4, atol=1e-5) for output in outputs):
        return "its forward pass gives other outputs with stacked layers"
    return None
