"""Parts that change state by side doors, do what the first pass does not see, or use one module more than once."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.training.odd_models.registry import WIDTH, Odd, refused, trains

# State by side doors


@refused("out= into a buffer", "buffer centre", centre=lambda: torch.zeros(WIDTH))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    torch.mul(x[0].detach(), 2.0, out=self.centre)  # type: ignore[call-overload]
    return x + self.centre  # type: ignore[operator]


@refused("spectral normalisation", "buffer body.weight_v", body=lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return self.body(x)  # type: ignore[no-any-return, operator]


@refused("a view of an attribute", "a tensor that it holds")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    self.constant.chunk(2, 1)[1].copy_(x.detach().unsqueeze(1))
    return x * self.constant[:, 3]


@refused("a parameter's data, in place", "parameter scale|a tensor that it holds")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    self.scale.data.mul_(0.5)
    return x * self.scale


@refused("a parameter's data", "not the one that was traced|parameter scale")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    self.scale.data = self.scale.data * 0.5
    return x * self.scale


@refused("inputs in place", "input or target in place")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2)


# What the first pass does not see


@trains("a hook on a gradient")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    h = self.first(x)
    h.register_hook(lambda gradient: 3 * gradient)
    return h  # type: ignore[no-any-return]


@refused("a hook on a gradient, beside Dropout", "register a hook")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    h = self.first(functional.dropout(x, 0.4))
    h.register_hook(lambda gradient: 3 * gradient)
    return h  # type: ignore[no-any-return]


@refused("inference mode", "not the one that was traced")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        h = self.first(x) * 2
    return x + h  # type: ignore[no-any-return]


@trains("gradients of gradients")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(self.first(x).square().sum(), x, create_graph=True)
    return found


@refused("gradients of gradients, beside Dropout", "did not see being made")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(functional.dropout(self.first(x), 0.3).square().sum(), x, create_graph=True)
    return found


@trains("vmap")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: row * self.scale)(x)


@trains("recomputed activations")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(self.first, x, use_reentrant=False)  # type: ignore[no-any-return]


@refused("a law that is not keyed", "cannot be keyed")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return functional.rrelu(self.first(x), training=True)


@refused("autocast", "enters torch.autocast")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = self.first(x)
    return x + h.float()  # type: ignore[no-any-return]


@refused("packed sequences", "sequences are packed, pad them", body=lambda: nn.GRU(WIDTH, WIDTH, batch_first=True))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(x.unsqueeze(1).expand(-1, 3, -1), torch.tensor([2]), batch_first=True)
    return self.body(rows)[1][0]  # type: ignore[no-any-return, operator]


# The same module, more than once


@trains("a layer used twice by one name")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(self.first(torch.tanh(self.first(x))))


@trains("a layer in a list twice", layers=lambda: nn.ModuleList([nn.Linear(WIDTH, WIDTH)] * 2))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    for layer in self.layers:  # type: ignore[union-attr]
        x = torch.tanh(layer(x))
    return x


@trains(
    "a frozen layer in a list twice", layers=lambda: nn.ModuleList([nn.Linear(WIDTH, WIDTH).requires_grad_(False)] * 2)
)
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    for layer in self.layers:  # type: ignore[union-attr]
        x = torch.tanh(layer(x))
    return x
