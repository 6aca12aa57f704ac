"""Models that reach for what traces and rules of batches get wrong: memory, layouts, state by side doors, odd ranks.

Each was found by somebody who tried to break isolation, or stands next to one that was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

WIDTH, CLASSES = 6, 3
Part = Callable[["Odd", torch.Tensor], torch.Tensor]


class Odd(nn.Module):
    """A perceptron with an odd part in front of it.

    Args:
        part: Maps a batch's inputs `[n, 6]` to as many.
        extra: Modules and tensors that it uses.
    """

    def __init__(self, part: Part, extra: dict[str, Callable[[], object]]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.tokens, self.scale = nn.Parameter(torch.randn(1, 4, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.constant = torch.randn(1, 4, WIDTH)
        self.part = part
        for name, make in extra.items():
            value = make()
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(self.part(self, x))))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], Odd]] = {}
"""What trains, each record alone."""
REFUSED: dict[str, tuple[Callable[[], Odd], str]] = {}
"""What is refused, and words of the reason."""


def trains(name: str, **extra: Callable[[], object]) -> Callable[[Part], Part]:
    """Register a part that trains."""

    def register(part: Part) -> Part:
        MODELS[name] = lambda: Odd(part, extra)
        return part

    return register


def refused(name: str, words: str, **extra: Callable[[], object]) -> Callable[[Part], Part]:
    """Register a part that is refused."""

    def register(part: Part) -> Part:
        REFUSED[name] = (lambda: Odd(part, extra), words)
        return part

    return register


def _repeated(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a parameter or constant for each record, without a copy."""
    return value.expand(x.shape[0], *[-1] * (value.dim() - 1))


# Memory


@refused("as_strided of inputs", "as_strided, which sees the memory of other records")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + x.as_strided((1, WIDTH), (WIDTH, 1), 0)


@refused("as_strided of hidden values", "as_strided, which sees the memory of other records")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    h = self.first(x)
    return h + h.as_strided((1, WIDTH), (0, 1), 0)  # type: ignore[no-any-return]


@trains("a diagonal filled in place")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    outer = torch.outer(x[0], x[0])
    outer.fill_diagonal_(1.0)
    return x @ outer


@trains("a diagonal that wraps")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x] * 9).fill_diagonal_(0.5, wrap=True).mean(0, keepdim=True)


@trains("memory that nobody filled")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + 0.0 * torch.empty_like(x).fill_(2.0) + torch.empty(1, WIDTH).copy_(x.detach())


@trains("windows of memory")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + x.unfold(1, 2, 1).sum().reshape(1, 1)


# Kernels on what has no memory of its own for each record


@trains("LayerNorm of a parameter")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + (functional.layer_norm(_repeated(self.tokens, x), (WIDTH,)) * x.unsqueeze(1)).mean(1)


@trains("LayerNorm of a constant")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    own = functional.layer_norm(_repeated(self.constant, x), (WIDTH,), self.scale, self.scale)
    return x + (own * x.unsqueeze(1)).mean(1)


@trains("GroupNorm of a parameter")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + (functional.group_norm(_repeated(self.tokens, x), 2) * x.unsqueeze(1)).mean(1)


@trains("InstanceNorm of a parameter")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + (functional.instance_norm(_repeated(self.tokens, x)) * x.unsqueeze(1)).mean(1)


@trains("class token", encoder=lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return self.encoder(torch.cat([_repeated(self.tokens[:, :1], x), x.unsqueeze(1)], 1))[:, 0]  # type: ignore[no-any-return, operator]


@trains("MaxPool1d of a parameter")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + functional.max_pool1d(_repeated(self.tokens, x), 2).mean((1, 2)).unsqueeze(1) * x


@trains("MaxPool2d of a parameter", image=lambda: nn.Parameter(torch.randn(1, 1, 4, 4 * WIDTH)))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + functional.max_pool2d(_repeated(self.image, x), 4).flatten(1) * x  # type: ignore[arg-type]


@trains("MaxPool3d of a parameter", volume=lambda: nn.Parameter(torch.randn(1, 1, 4, 4, 4 * WIDTH)))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + functional.max_pool3d(_repeated(self.volume, x), 4).flatten(1) * x  # type: ignore[arg-type]


@trains("AdaptiveAvgPool2d of a parameter", image=lambda: nn.Parameter(torch.randn(1, 1, 4, 4 * WIDTH)))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + functional.adaptive_avg_pool2d(_repeated(self.image, x), (1, WIDTH)).flatten(1) * x  # type: ignore[arg-type]


@trains("convolution of a parameter", filters=lambda: nn.Conv1d(4, 1, 3, padding=1))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + self.filters(_repeated(self.tokens, x)).squeeze(1) * x  # type: ignore[no-any-return, operator]


@trains("convolution of channels that lie last", filters=lambda: nn.Conv2d(6, 6, 3, padding=1))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    image = (x.view(-1, 1, 1, WIDTH) * self.tokens.unsqueeze(2)).permute(0, 3, 1, 2)
    return x + self.filters(image).mean((2, 3))  # type: ignore[no-any-return, operator]


@trains("interpolation of a parameter")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    own = functional.interpolate(_repeated(self.tokens, x), size=12, mode="linear")
    return own.mean((1, 2)).unsqueeze(1) * x


@trains("embedding under no_grad", table=lambda: nn.Embedding(10, WIDTH))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        own = self.table((x[:, 0].abs() * 3).clamp(max=9).long())  # type: ignore[operator]
    return x + own  # type: ignore[no-any-return]


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


# Types, ranks and orders


@trains("another memory format", filters=lambda: nn.Conv2d(1, 2, 3, padding=1))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    image = x.reshape(-1, 1, 2, 3).to(memory_format=torch.channels_last)
    return x + self.filters(image).mean((2, 3)).mean(1, keepdim=True)  # type: ignore[no-any-return, operator]


@trains("dimensions by negative numbers")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    outer = torch.outer(x[0], x[0] + self.scale)
    return x @ outer.permute(-1, 0) + x @ outer.permute(-2, -1)


@trains("sums of truth values")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x * ((x > -9).sum(0, keepdim=True) + 1) * ((x > 0).unsqueeze(0).sum(0) + 1) * ((x[0, 0] > -9).sum() + 1)


@trains("a column added to a product", column=lambda: nn.Parameter(torch.randn(4, 1)))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([x] * 4)
    first = torch.addmm(self.column, rows, self.first.weight)  # type: ignore[call-overload]
    return (first + torch.addmm(x[0, :4].unsqueeze(1), rows, self.first.weight)).mean(0, keepdim=True)  # type: ignore[no-any-return]


@trains("single numbers")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    first = (x[0, 0] * 0).long()
    return x * torch.cumsum(x[0, 0], 0) * torch.gather(x[0], 0, first) * torch.gather(x[0, 0], 0, first)


@trains("a fill by a record's value")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return torch.index_fill(x * 1.0, 1, torch.tensor([1, 2]), x[0, 0])


@trains("mixed precision")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + 1e-3 * (x.double() * self.scale.double()).float()


@trains("writes by mask and by index")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    own, zeros = x.clone(), torch.zeros(1, WIDTH)
    own[own > 0] = 0.5
    zeros[:, torch.tensor([1, 2])] = x[:, :2]
    return own + zeros + torch.zeros(WIDTH).index_add(0, torch.tensor([1, 1, 2, 2, 3, 3]), x[0])


@trains("orders and distances")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    distances = torch.cdist(x.unsqueeze(1), self.tokens).sum((1, 2)).unsqueeze(1)
    return x + x.sort(1).values + x.topk(2, 1).values.sum(1, keepdim=True) + distances


@trains("linear algebra")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    matrix = 2 * torch.eye(WIDTH) + torch.outer(x[0], x[0])
    return torch.linalg.solve(matrix, x.t()).t() + torch.linalg.inv(matrix).sum(0, keepdim=True)


@trains("spectra")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfft(x, dim=1).abs().sum(1, keepdim=True) * x


@trains("batch statistics of one record", norm=lambda: nn.BatchNorm1d(4, track_running_stats=False))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return self.norm(x.unsqueeze(1).expand(-1, 4, -1) + self.tokens).mean(1)  # type: ignore[no-any-return, operator]


@trains("weight normalisation", body=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return self.body(x)  # type: ignore[no-any-return, operator]


@trains("a number of a buffer", temperature=lambda: torch.tensor(2.0))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x * self.temperature.item()  # type: ignore[operator, union-attr]


@trains("a single number added to a product", offset=lambda: nn.Parameter(torch.tensor(0.5)))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(self.offset, x, self.first.weight)  # type: ignore[call-overload, no-any-return]


@trains("attention to nothing, by numbers")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(3, 3)
    mask[0] = -torch.inf
    heads = x.reshape(-1, 1, 3, 2)
    return functional.scaled_dot_product_attention(heads, heads * 2, heads, mask).flatten(1)


# Random numbers


@trains("every law that is keyed")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    h = functional.alpha_dropout(functional.dropout(self.first(x), 0.3), 0.2, True)
    h = h + functional.dropout1d(h.unsqueeze(1).expand(-1, 4, -1), 0.3).mean(1)
    h = h + torch.rand_like(x) + torch.randn(1, WIDTH) + torch.bernoulli(torch.sigmoid(x))
    h = h + torch.empty_like(x).uniform_(1, 2) + torch.zeros_like(x).normal_(1, 2)
    return h + torch.empty(1, WIDTH).bernoulli_(0.3)  # type: ignore[no-any-return]


@trains("recurrent dropout", body=lambda: nn.LSTM(WIDTH, WIDTH, 2, dropout=0.3, batch_first=True))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return self.body(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1]  # type: ignore[no-any-return, operator]


@trains("attention dropout", body=lambda: nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    rows = x.unsqueeze(1) + _repeated(self.tokens, x)
    return self.body(rows, rows, rows, need_weights=False)[0].mean(1)  # type: ignore[no-any-return, operator]


@refused("an operator of one's own", "custom operator fedray_tests.centred")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return centred(x)  # type: ignore[no-any-return]


SEEN: list[torch.Tensor] = []


@torch.library.custom_op("fedray_tests::centred", mutates_args=())
def centred(x: torch.Tensor) -> torch.Tensor:
    """Subtract the record that came before: state where no trace sees it."""
    SEEN.append(x.clone())
    return x - SEEN[-2] if len(SEEN) > 1 else x.clone()


@centred.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)
