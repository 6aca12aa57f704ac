"""Rules of convolutions, pooling and group normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedray.training.program import Value
from fedray.training.rules.call import Call, Rule, written


def group_norm(call: Call) -> str | None:
    """GroupNorm without a learnt scale or shift; records and batch become one batch."""
    x, weight, bias, number, channels, size, groups, eps = call.args
    if weight is not None or bias is not None:
        return None
    flat = call.direct(call.flat(x), None, None, f"{call.n} * {number}", channels, size, groups, eps)
    shape = "".join(f", {one}" for one in call.of(x).shape)
    few = f"{call.n}, {number}, {groups}"
    return f"(lambda r: (r[0].view({call.n}{shape}), r[1].view({few}), r[2].view({few})))({flat})"


def group_norm_backward(call: Call) -> str | None:
    """The input gradient of GroupNorm without a learnt scale."""
    grad, x, mean, rstd, weight, number, channels, size, groups, mask = call.args
    if weight is not None:
        return None
    shape = "".join(f", {one}" for one in call.of(x).shape)
    flat = call.direct(
        call.flat(grad),
        call.flat(x),
        call.flat(mean),
        call.flat(rstd),
        None,
        f"{call.n} * {number}",
        channels,
        size,
        groups,
        mask,
    )
    return f"(lambda r: (r[0].view({call.n}{shape}), None, None))({flat})"


def images(call: Call, spatial: int) -> bool:
    """Tell whether one record's first argument is a batch of images (and not one image)."""
    return call.rank() == spatial + 2


def pool(spatial: int, tensors: int = 1) -> Rule:
    """Return the rule of pooling and the like: the first `tensors` arguments and the results are batches of images."""

    def rule(call: Call) -> str | None:
        own = call.args[:tensors]
        if not images(call, spatial) or any(call.rank(i) != spatial + 2 for i in range(tensors)):
            return None
        more = [call.flat(argument) if isinstance(argument, Value) else argument for argument in call.args[tensors:]]
        flat = call.direct(*(call.flat(argument) for argument in own), *more, **call.kwargs)
        number = call.of(own[0]).shape[0]
        if call.spec is not None:
            return f"(lambda r: r.view({call.n}, {number}, *r.shape[1:]))({flat})"
        return f"tuple(r.view({call.n}, {number}, *r.shape[1:]) for r in {flat})"

    return rule


def max_pool2d(call: Call) -> str | None:
    """Max pooling with channels last: the kernel for that layout is six times as fast on a CPU."""
    if not images(call, 2):
        return None
    x, *rest = call.args
    flat = call.direct(f"{call.merged(x)}.contiguous(memory_format=torch.channels_last)", *rest)
    return f"tuple(r.view({call.n}, {call.of(x).shape[0]}, *r.shape[1:]) for r in {flat})"


def max_pool2d_gradient(call: Call) -> str | None:
    """The input gradient of max pooling, by `max_pool2d_backward`."""
    grad, x, *rest, indices = call.args
    if not images(call, 2) or call.rank(1) != 4:
        return None
    flat = f"max_pool2d_backward({call.merged(grad)}, {call.merged(x)}, {written(rest)}, {call.merged(indices)})"
    return f"(lambda r: r.view({call.n}, {call.of(x).shape[0]}, *r.shape[1:]))({flat})"


def max_pool2d_backward(
    grad: torch.Tensor, x: torch.Tensor, rest: Sequence[Any], indices: torch.Tensor
) -> torch.Tensor:
    """Return the input gradient of `max_pool2d`, laid out as x is."""
    last = torch.channels_last
    # Of x the kernel takes size and layout.
    shaped = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=last)
    found: torch.Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        grad.contiguous(memory_format=last), shaped, *rest, indices.contiguous(memory_format=last)
    )
    return found.contiguous() if x.is_contiguous() else found


def convolution(call: Call) -> str | None:
    """Convolution of all records' images as one batch; weights are the same for all."""
    x, weight, bias, *rest = call.args
    if not call.is_batched(x) or call.is_batched(weight) or call.is_batched(bias):
        return None
    number = call.of(x).shape[0]
    flat = call.direct(call.merged(x), weight, bias, *rest)
    return f"(lambda r: r.view({call.n}, {number}, *r.shape[1:]))({flat})"


def convolution_backward(call: Call) -> str | None:
    """The gradients of such a convolution: the input's as one batch, the weight's for each record."""
    grad, x, weight, _, *rest, mask = call.args
    if call.is_batched(weight) or call.of(x).shape[0] != 1:
        return None
    flat = call.direct(call.merged(grad), call.merged(x), weight, None, *rest, [True, False, False])
    return convolution_gradients(call, f"{flat}[0].unsqueeze(1)" if mask[0] else "None")


def convolution_gradients(call: Call, of_input: str) -> str:
    """Return the three gradients of a convolution, that of its input given; each record is a group of one large one.

    Args:
        call: Of convolution_backward.
        of_input: Source of the input's gradient.
    """
    grad, x, _, _, *rest, groups, mask = call.args
    parts = [of_input, "None", "None"]
    if mask[1]:
        shape = call.of(call.args[2]).shape
        images = f"{call.many(x)}.reshape(1, -1, {', '.join(map(str, call.of(x).shape[2:]))})"
        grads = f"{call.many(grad)}.reshape(1, -1, {', '.join(map(str, call.of(grad).shape[2:]))})"
        sizes = ", ".join(map(str, shape))
        # The gradient of a weight takes its shape alone.
        shaped = f"{images}.new_zeros(()).expand({call.n} * {shape[0]}, {', '.join(map(str, shape[1:]))})"
        flat = call.direct(grads, images, shaped, None, *rest, f"{call.n} * {groups}", [False, True, False])
        parts[1] = f"{flat}[1].view({call.n}, {sizes})"
    if mask[2]:
        parts[2] = f"{call.many(grad)}.sum({[1, *range(3, 1 + call.rank(0))]})"
    return f"({', '.join(parts)})"
