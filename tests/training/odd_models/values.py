"""Parts with odd types, ranks and orders, and those that draw random numbers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.training.odd_models.registry import WIDTH, Odd, refused, repeated, trains

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
    rows = x.unsqueeze(1) + repeated(self.tokens, x)
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
