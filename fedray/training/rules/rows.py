"""Rules of embeddings, LayerNorm and losses of rows."""

from __future__ import annotations

from fedray.training.rules.call import Call, written


def layer_norm_backward(call: Call) -> str | None:
    """The input gradient of LayerNorm without a learnt scale or shift."""
    grad, x, shape, mean, rstd, weight, bias, mask = call.args
    if weight is not None or bias is not None:
        return None
    return call.direct(
        call.packed(grad),
        call.packed(x),
        shape,
        call.packed(mean),
        call.packed(rstd),
        None,
        None,
        mask,
    )


def embedding(call: Call) -> str | None:
    """Rows of a table that is the same for all records, or the same rows of each record's own table."""
    weight, tokens, *_ = call.args
    if not call.is_batched(tokens):
        return f"{written(weight)}[:, {written(tokens)}]"
    if call.is_batched(weight):
        return None
    return f"torch.embedding({written(weight)}, {written(tokens)})"


def embedding_backward(call: Call) -> str | None:
    """Each record's gradient of the table: its rows' gradients added up."""
    grad, tokens, number, padding, by_frequency = call.args
    if by_frequency:
        return None
    width = call.shape[1]
    keep = f".masked_fill((t == {padding}).unsqueeze(2), 0.0)" if padding >= 0 else ""
    body = f"g.new_zeros({call.n}, {number}, {width}).scatter_add_(1, t.unsqueeze(2).expand(-1, -1, {width}), g{keep})"
    return f"(lambda t, g: {body})({call.many(tokens)}.reshape({call.n}, -1), {call.many(grad)}.reshape({call.n}, -1, {width}))"


def nll(call: Call) -> str | None:
    """Negative log-likelihood of rows, not reduced."""
    scores, target, weight, reduction, ignored = call.args
    if reduction != 0 or call.is_batched(weight) or call.rank() != 2:
        return None
    flat = call.direct(call.flat(scores), call.flat(target), weight, reduction, ignored)
    return f"(lambda r: (r[0].view({call.n}, {call.of(scores).shape[0]}), r[1]))({flat})"


def nll_backward(call: Call) -> str | None:
    """The gradient of `nll` at the scores."""
    grad, scores, target, weight, reduction, ignored, _total = call.args
    if reduction != 0 or call.is_batched(weight) or call.rank(1) != 2:
        return None
    rows, classes = call.of(scores).shape
    total = f"{written(scores)}.new_zeros(())"
    flat = call.direct(call.flat(grad), call.flat(scores), call.flat(target), weight, reduction, ignored, total)
    return f"{flat}.view({call.n}, {rows}, {classes})"
