"""Parts that reach for memory, and kernels on what has no memory of its own for each record."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.training.odd_models.registry import WIDTH, Odd, refused, repeated, trains


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
    return x + (functional.layer_norm(repeated(self.tokens, x), (WIDTH,)) * x.unsqueeze(1)).mean(1)


@trains("LayerNorm of a constant")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    own = functional.layer_norm(repeated(self.constant, x), (WIDTH,), self.scale, self.scale)
    return x + (own * x.unsqueeze(1)).mean(1)


@trains("GroupNorm of a parameter")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + (functional.group_norm(repeated(self.tokens, x), 2) * x.unsqueeze(1)).mean(1)


@trains("InstanceNorm of a parameter")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + (functional.instance_norm(repeated(self.tokens, x)) * x.unsqueeze(1)).mean(1)


@trains("class token", encoder=lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return self.encoder(torch.cat([repeated(self.tokens[:, :1], x), x.unsqueeze(1)], 1))[:, 0]  # type: ignore[no-any-return, operator]


@trains("MaxPool1d of a parameter")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + functional.max_pool1d(repeated(self.tokens, x), 2).mean((1, 2)).unsqueeze(1) * x


@trains("MaxPool2d of a parameter", image=lambda: nn.Parameter(torch.randn(1, 1, 4, 4 * WIDTH)))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + functional.max_pool2d(repeated(self.image, x), 4).flatten(1) * x  # type: ignore[arg-type]


@trains("MaxPool3d of a parameter", volume=lambda: nn.Parameter(torch.randn(1, 1, 4, 4, 4 * WIDTH)))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + functional.max_pool3d(repeated(self.volume, x), 4).flatten(1) * x  # type: ignore[arg-type]


@trains("AdaptiveAvgPool2d of a parameter", image=lambda: nn.Parameter(torch.randn(1, 1, 4, 4 * WIDTH)))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + functional.adaptive_avg_pool2d(repeated(self.image, x), (1, WIDTH)).flatten(1) * x  # type: ignore[arg-type]


@trains("convolution of a parameter", filters=lambda: nn.Conv1d(4, 1, 3, padding=1))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    return x + self.filters(repeated(self.tokens, x)).squeeze(1) * x  # type: ignore[no-any-return, operator]


@trains("convolution of channels that lie last", filters=lambda: nn.Conv2d(6, 6, 3, padding=1))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    image = (x.view(-1, 1, 1, WIDTH) * self.tokens.unsqueeze(2)).permute(0, 3, 1, 2)
    return x + self.filters(image).mean((2, 3))  # type: ignore[no-any-return, operator]


@trains("interpolation of a parameter")
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    own = functional.interpolate(repeated(self.tokens, x), size=12, mode="linear")
    return own.mean((1, 2)).unsqueeze(1) * x


@trains("embedding under no_grad", table=lambda: nn.Embedding(10, WIDTH))
def _(self: Odd, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        own = self.table((x[:, 0].abs() * 3).clamp(max=9).long())  # type: ignore[operator]
    return x + own  # type: ignore[no-any-return]
