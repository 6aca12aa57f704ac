"""The first pass of a trace run again under autograd, with weights tapped, draws keyed and layers taken apart.

What is rewritten: products with weights and embeddings (tapped), Dropout and random numbers (inputs of the program),
recurrent layers (an explicit loop), attention (its formula), bags of embeddings (a gather and a reduction).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fedray.training import recurrence
from fedray.training.parameter_uses import RECURRENT, Use, turned, weight_place
from fedray.training.program import Draw, Untraceable

_A = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One use of a tapped weight.

    Args:
        param: Which trainable parameter.
        input: a.
        output: What its gradient e is taken of.
    """

    param: int
    input: torch.Tensor
    output: torch.Tensor


class Rewriter(fx.Interpreter):
    """Runs a forward graph with replacements.

    Args:
        forward: Whose first placeholders are the trainable parameters.
        uses: The parameters to tap, see `uses_of`.
        params: Trainable parameters; those that are tapped need no gradient.
        drawn: Random numbers in the order in which they are taken; None to find out what is drawn.
        rules: What takes the place of an operator: called with the rewriter and the operator's arguments.
    """

    def __init__(
        self,
        forward: fx.GraphModule,
        uses: Mapping[int, Use],
        params: Sequence[torch.Tensor],
        drawn: Sequence[torch.Tensor] | None,
        rules: Mapping[Any, Callable[..., Any]],
    ) -> None:
        super().__init__(forward, garbage_collect_values=False)
        self.taps: list[Tap] = []
        self.draws: list[Draw] = []
        self._uses = uses
        self._rules = rules
        self._drawn = drawn
        placeholders = [node for node in forward.graph.nodes if node.op == "placeholder"]
        self._tapped = {node: index for index, node in enumerate(placeholders[: len(params)]) if index in uses}
        for node in forward.graph.nodes:  # a weight that is transposed is the same weight
            if node.op == "call_function" and turned(node) and node.args[0] in self._tapped:
                self._tapped[node] = self._tapped[node.args[0]]

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, or what takes its place."""
        if n.op != "call_function":
            return super().run_node(n)
        arguments, named = self.fetch_args_kwargs_from_env(n)
        rule = self._rules.get(n.target)
        if n.target in RECURRENT:
            return self._recurrent(n, arguments)
        if rule is not None:
            return rule(self, *arguments, **named)
        if isinstance(n.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in n.target.tags:
            raise Untraceable(
                f"{n.target} draws random numbers in a way that cannot be keyed; use Dropout, torch.rand or torch.randn"
            )
        place = weight_place(n)
        weight = None if place is None else self._tapped.get(n.args[place[0]])
        if place is None or weight is None:
            return n.target(*arguments, **named)  # type: ignore[operator]  # an operator
        a = arguments[1 - place[0]] if n.target is not _A.addmm.default else arguments[1]
        return self.tap(weight, a, n.target(*arguments, **named))  # type: ignore[operator]  # an operator

    def tap(self, param: int, a: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Note one use of a weight; return its output for what follows."""
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output.requires_grad_()
        self.taps.append(Tap(param=param, input=a, output=output))
        return output.clone()  # what follows may work in place; the trace drops the copy

    def draw(self, law: Any, shape: Sequence[int]) -> torch.Tensor:
        """Return the next random numbers."""
        self.draws.append(Draw(law=law, shape=tuple(int(size) for size in shape)))
        if self._drawn is None:
            return torch.zeros(list(shape))
        return self._drawn[len(self.draws) - 1]

    def dropout(self, x: torch.Tensor, rate: float, train: bool, shape: Sequence[int] | None = None) -> torch.Tensor:
        """Return x with values dropped at `rate`, others scaled up (Srivastava et al. 2014)."""
        if not train or rate == 0:
            return x
        if rate == 1:
            return x * 0.0
        keep = self.draw("uniform", x.shape if shape is None else shape) >= rate
        return x * (keep.to(x.dtype) * (1.0 / (1.0 - rate)))

    def _recurrent(self, node: fx.Node, arguments: Sequence[Any]) -> Any:
        weights = [self._tapped.get(one) for one in node.args[2]]  # type: ignore[union-attr]  # a list of nodes
        return recurrence.run(RECURRENT[node.target], arguments, weights, self.tap, self.dropout)  # type: ignore[index]  # checked by the caller


def draws_of(forward: fx.GraphModule, rules: Mapping[Any, Callable[..., Any]]) -> list[Draw]:
    """Return what a forward graph draws, in order."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values = [node.meta["val"] for node in forward.graph.nodes if node.op == "placeholder"]
    with mode:
        values = [torch.empty(value.shape, dtype=value.dtype) for value in values]
        rewriter = Rewriter(forward, {}, [], None, rules)
        rewriter.run(*values)
    return rewriter.draws


def _feature_dropout(rewriter: Rewriter, x: torch.Tensor, rate: float, train: bool) -> torch.Tensor:
    return rewriter.dropout(x, rate, train, [*x.shape[:2], *([1] * (x.dim() - 2))])


def _alpha_dropout(rewriter: Rewriter, x: torch.Tensor, rate: float, train: bool) -> torch.Tensor:
    """Dropout that keeps mean and variance of SELU's outputs (Klambauer et al. 2017, section 3)."""
    if not train or rate == 0:
        return x
    alpha = -1.7580993408473766
    scale = 1.0 / math.sqrt((alpha * alpha * rate + 1.0) * (1.0 - rate))
    keep = rewriter.draw("uniform", x.shape) >= rate
    return torch.where(keep, x, alpha) * scale - scale * alpha * rate


def _in_place(rule: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(rewriter: Rewriter, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return x.copy_(rule(rewriter, x, *arguments))

    return run


def _rand(law: str) -> Callable[..., torch.Tensor]:
    def run(rewriter: Rewriter, size: Sequence[int], **named: Any) -> torch.Tensor:
        dtype = named.get("dtype") or torch.get_default_dtype()
        return rewriter.draw(law, size).to(dtype)

    return run


def _rand_like(law: str) -> Callable[..., torch.Tensor]:
    def run(rewriter: Rewriter, x: torch.Tensor, **named: Any) -> torch.Tensor:
        return rewriter.draw(law, x.shape).to(named.get("dtype") or x.dtype)

    return run


def _bernoulli(rewriter: Rewriter, x: torch.Tensor, *_p: Any) -> torch.Tensor:
    return (rewriter.draw("uniform", x.shape) >= 1 - x).to(x.dtype)


def _bernoulli_p(rewriter: Rewriter, x: torch.Tensor, rate: float = 0.5, **_named: Any) -> torch.Tensor:
    return (rewriter.draw("uniform", x.shape) >= 1 - rate).to(x.dtype)


def _bernoulli_in_place(rewriter: Rewriter, x: torch.Tensor, rate: float = 0.5, **_named: Any) -> torch.Tensor:
    return x.copy_((rewriter.draw("uniform", x.shape) >= 1 - rate).to(x.dtype))


def _uniform_in_place(
    rewriter: Rewriter, x: torch.Tensor, low: float = 0.0, high: float = 1.0, **_named: Any
) -> torch.Tensor:
    return x.copy_(low + (high - low) * rewriter.draw("uniform", x.shape))


def _normal_in_place(
    rewriter: Rewriter, x: torch.Tensor, mean: float = 0.0, std: float = 1.0, **_named: Any
) -> torch.Tensor:
    return x.copy_(mean + std * rewriter.draw("normal", x.shape))


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
    found: torch.Tensor = _A.group_norm.default(x, groups, None, None, eps)
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
    return _affine(_A.layer_norm.default(x, shape, None, None, eps), weight, bias)


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
        found: torch.Tensor = _A.cross_entropy_loss.default(scores, target, weight, reduction, ignored, smoothing)
        return found
    rows = scores.movedim(1, -1).reshape(-1, scores.shape[1])
    losses = torch.nn.functional.nll_loss(
        torch.log_softmax(rows, 1), target.reshape(-1), reduction="none", ignore_index=ignored
    )
    if reduction == 0:
        return losses.reshape(target.shape)
    return losses.sum() if reduction == 2 else losses.sum() / (target != ignored).sum()


_RULES: dict[Any, Callable[..., Any]] = {
    _A.dropout.default: Rewriter.dropout,
    _A.dropout_.default: _in_place(Rewriter.dropout),
    _A.feature_dropout.default: _feature_dropout,
    _A.feature_dropout_.default: _in_place(_feature_dropout),
    _A.alpha_dropout.default: _alpha_dropout,
    _A.alpha_dropout_.default: _in_place(_alpha_dropout),
    _A.rand.default: _rand("uniform"),
    _A.randn.default: _rand("normal"),
    _A.rand_like.default: _rand_like("uniform"),
    _A.randn_like.default: _rand_like("normal"),
    _A.bernoulli.default: _bernoulli,
    _A.bernoulli.p: _bernoulli_p,
    _A.bernoulli_.float: _bernoulli_in_place,
    _A.uniform_.default: _uniform_in_place,
    _A.normal_.default: _normal_in_place,
    _A.fill_diagonal_.default: _fill_diagonal,
    _A.scaled_dot_product_attention.default: _attention,
    _A.embedding_bag.padding_idx: _embedding_bag,
    _A.embedding_bag.default: _embedding_bag,
    _A.layer_norm.default: _layer_norm,
    _A.group_norm.default: _group_norm,
    _A.instance_norm.default: _instance_norm,
    _A.prelu.default: _prelu,
    _A.bilinear.default: _bilinear,
    _A.cross_entropy_loss.default: _cross_entropy,
}
