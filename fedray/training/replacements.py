"""Replaces layers by formulas of simpler operations: attention, norms with a separate scale, bags of embeddings, …"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedray.training.keyed_draws import (
    alpha_dropout,
    bernoulli,
    bernoulli_in_place,
    bernoulli_p,
    feature_dropout,
    in_place,
    normal_in_place,
    rand,
    rand_like,
    uniform_in_place,
)
from fedray.training.program import Untraceable
from fedray.training.rewriting import ATEN, Rewriter


def _fill_diagonal(_: Rewriter, x: torch.Tensor, value: float, wrap: bool = False) -> torch.Tensor:
    if x.dim() != 2:
        raise Untraceable("fill_diagonal_ is supported for matrices")
    columns = x.shape[1]
    chosen = torch.arange(x.numel(), device=x.device) % (columns + 1) == 0
    if not wrap:
        chosen = chosen & (torch.arange(x.numel(), device=x.device) < columns * columns)
    return x.copy_(x.masked_fill(chosen.view(x.shape), value))


def _attention(
    rewriter: Rewriter,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    rate: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention by its formula (Vaswani et al. 2017, equation 1)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if mask is None:
        weights = torch.softmax(scores, -1)
    else:  # nothing to attend to gives nothing, not NaN
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    return torch.matmul(rewriter.dropout(weights, rate, True), value)


def _embedding_bag(
    rewriter: Rewriter,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    by_frequency: bool = False,
    mode: int = 0,
    sparse: bool = False,
    weights: torch.Tensor | None = None,
    include_last: bool = False,
    padding: int | None = None,
) -> tuple[torch.Tensor, ...]:
    if offsets.numel() != 1 or by_frequency or sparse or include_last or padding is not None:
        raise Untraceable(
            "nn.EmbeddingBag is supported for one bag a record (x of shape [records, tokens]), without padding"
        )
    rows = torch.nn.functional.embedding(tokens, weight)
    if weights is not None:
        rows = rows * weights.unsqueeze(1)
    reduce: Any = (torch.sum, torch.mean, torch.amax)[mode]
    found = reduce(rows, 0, keepdim=True)
    return found, found, found, found


def _group_norm(
    rewriter: Rewriter,
    x: torch.Tensor,
    groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    _cudnn: bool = True,
) -> torch.Tensor:
    """GroupNorm with its scale apart, so that a weight's gradient per record is a product and a sum."""
    found: torch.Tensor = ATEN.group_norm.default(x, groups, None, None, eps)
    shape = [1, -1, *([1] * (x.dim() - 2))]
    return _affine(
        found, None if weight is None else weight.reshape(shape), None if bias is None else bias.reshape(shape)
    )


def _layer_norm(
    rewriter: Rewriter,
    x: torch.Tensor,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    _cudnn: bool = True,
) -> torch.Tensor:
    """LayerNorm with its scale apart."""
    return _affine(ATEN.layer_norm.default(x, shape, None, None, eps), weight, bias)


def _affine(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    if weight is not None and bias is not None:
        return torch.addcmul(bias, x, weight)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _instance_norm(
    rewriter: Rewriter,
    x: torch.Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    own_statistics: bool,
    _momentum: float,
    eps: float,
    _cudnn: bool,
) -> torch.Tensor:
    """InstanceNorm: GroupNorm of groups of one channel."""
    if not own_statistics or mean is not None or variance is not None:
        raise Untraceable("InstanceNorm with track_running_stats keeps statistics of records; leave it out")
    return _group_norm(rewriter, x, x.shape[1], weight, bias, eps)


def _prelu(rewriter: Rewriter, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    weight = weight.reshape([1, -1, *([1] * (x.dim() - 2))]) if x.dim() > 1 else weight
    return torch.where(x > 0, x, weight * x)


def _bilinear(
    rewriter: Rewriter, left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, bias: Any = None
) -> torch.Tensor:
    """Bilinear: each output is leftᵀ W right; a product with all of W, and a sum."""
    out, inner, other = weight.shape
    product = torch.matmul(left, weight.permute(1, 0, 2).reshape(inner, out * other))
    found = (product.reshape(*left.shape[:-1], out, other) * right.unsqueeze(-2)).sum(-1)
    return found if bias is None else found + bias


def _cross_entropy(
    rewriter: Rewriter,
    scores: torch.Tensor,
    target: torch.Tensor,
    weight: Any = None,
    reduction: int = 1,
    ignored: int = -100,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy with class indices, classes last: a row a position."""
    if weight is not None or smoothing or target.is_floating_point() or scores.dim() == 1:
        found: torch.Tensor = ATEN.cross_entropy_loss.default(scores, target, weight, reduction, ignored, smoothing)
        return found
    rows = scores.movedim(1, -1).reshape(-1, scores.shape[1])
    losses = torch.nn.functional.nll_loss(
        torch.log_softmax(rows, 1), target.reshape(-1), reduction="none", ignore_index=ignored
    )
    if reduction == 0:
        return losses.reshape(target.shape)
    return losses.sum() if reduction == 2 else losses.sum() / (target != ignored).sum()


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    ATEN.dropout.default: Rewriter.dropout,
    ATEN.dropout_.default: in_place(Rewriter.dropout),
    ATEN.feature_dropout.default: feature_dropout,
    ATEN.feature_dropout_.default: in_place(feature_dropout),
    ATEN.alpha_dropout.default: alpha_dropout,
    ATEN.alpha_dropout_.default: in_place(alpha_dropout),
    ATEN.rand.default: rand("uniform"),
    ATEN.randn.default: rand("normal"),
    ATEN.rand_like.default: rand_like("uniform"),
    ATEN.randn_like.default: rand_like("normal"),
    ATEN.bernoulli.default: bernoulli,
    ATEN.bernoulli.p: bernoulli_p,
    ATEN.bernoulli_.float: bernoulli_in_place,
    ATEN.uniform_.default: uniform_in_place,
    ATEN.normal_.default: normal_in_place,
    ATEN.fill_diagonal_.default: _fill_diagonal,
    ATEN.scaled_dot_product_attention.default: _attention,
    ATEN.embedding_bag.padding_idx: _embedding_bag,
    ATEN.embedding_bag.default: _embedding_bag,
    ATEN.layer_norm.default: _layer_norm,
    ATEN.group_norm.default: _group_norm,
    ATEN.instance_norm.default: _instance_norm,
    ATEN.prelu.default: _prelu,
    ATEN.bilinear.default: _bilinear,
    ATEN.cross_entropy_loss.default: _cross_entropy,
}
