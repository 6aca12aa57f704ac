"""Rules of products of matrices."""

from __future__ import annotations

from fedray.training.rules.call import Call, written


def mm(call: Call) -> str | None:
    """Product of two matrices; records become rows where only the first one differs between records."""
    a, b = call.args
    if call.is_batched(a) and call.is_batched(b):
        return f"torch.bmm({written(a)}, {written(b)})"
    if call.is_batched(a):
        rows, inner = call.of(a).shape
        out = call.of(b).shape[1]
        if rows == 1:
            return f"torch.mm({written(a)}.reshape({call.n}, {inner}), {written(b)}).unsqueeze(1)"
        return f"torch.mm({written(a)}.reshape(-1, {inner}), {written(b)}).view({call.n}, {rows}, {out})"
    return f"torch.matmul({written(a)}, {written(b)})"


def same_for_rows(shape: tuple[int, ...]) -> bool:
    """Tell whether an addend of this shape is the same for each row of a matrix."""
    return len(shape) < 2 or shape[0] == 1


def addmm(call: Call) -> str | None:
    """Product of two matrices plus an addend, for a second matrix that is the same for all records."""
    bias, a, b = call.args
    if call.kwargs or call.is_batched(b):
        return None
    if not call.is_batched(a):
        return f"torch.add({call.aligned(bias, 2)}, torch.mm({written(a)}, {written(b)}))"
    rows, inner = call.of(a).shape
    out = call.of(b).shape[1]
    added = written(bias)
    if call.is_batched(bias) and call.of(bias).shape == call.shape:
        added = f"{written(bias)}.reshape(-1, {out})"
    elif call.is_batched(bias) or not same_for_rows(call.of(bias).shape):
        product = f"torch.mm({written(a)}.reshape(-1, {inner}), {written(b)}).view({call.n}, {rows}, {out})"
        return f"torch.add({call.aligned(bias, 2)}, {product})"
    return f"torch.addmm({added}, {written(a)}.reshape(-1, {inner}), {written(b)}).view({call.n}, {rows}, {out})"


def bmm(call: Call) -> str | None:
    """Products of batches of matrices; records and batch become one batch."""
    a, b = call.args
    if not (call.is_batched(a) and call.is_batched(b)):
        return f"torch.matmul({written(a)}, {written(b)})"
    sizes = "".join(f", {size}" for size in call.shape)
    if call.shape[0] == 1:
        return f"torch.bmm({written(a)}.squeeze(1), {written(b)}.squeeze(1)).unsqueeze(1)"
    return f"torch.bmm({written(a)}.flatten(0, 1), {written(b)}.flatten(0, 1)).view({call.n}{sizes})"
