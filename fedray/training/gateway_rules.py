"""Rules for operations on records and the parameters of their own gateways; see `fedray.training.batching`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fedray.training.program import Instruction, Spec, Value
from fedray.training.rules.call import Call, written
from fedray.training.rules.images import convolution_gradients
from fedray.training.rules.matrices import same_for_rows


class MixedCall(Call):
    """The call of an operation on values of records `[n, …]` and of gateways `[m, …]`.

    Args:
        instruction: The operation.
        of_records: Values of records.
        of_gateways: Values of gateways.
        specs: Shape and type of each value, for one record.
        bound: Returns the name of an operator in the generated source.
    """

    def __init__(
        self,
        instruction: Instruction,
        of_records: set[int],
        of_gateways: set[int],
        specs: Mapping[int, Spec],
        bound: Callable[[str], str],
    ) -> None:
        super().__init__(instruction, of_records, specs, bound)
        self._of_gateways = of_gateways

    def is_of_gateways(self, argument: Any) -> bool:
        """Tell whether an argument has a leading dimension of gateways."""
        return isinstance(argument, Value) and argument.index in self._of_gateways

    def many(self, argument: Any) -> str:
        """See `Call.many`; an argument of gateways is repeated for each one's records."""
        if not self.is_of_gateways(argument):
            return super().many(argument)
        shape = "".join(f", {size}" for size in self.of(argument).shape)
        return f"{written(argument)}.unsqueeze(1).expand(m, b{shape}).flatten(0, 1)"

    def aligned(self, argument: Any, rank: int) -> str:
        """Return an argument in a shape that broadcasts against `[m, b, …]` with `rank` further dimensions."""
        if not isinstance(argument, Value):
            return written(argument)
        shape = self.of(argument).shape
        sizes = "".join(f", {size}" for size in [1] * (rank - len(shape)) + list(shape))
        if self.is_of_gateways(argument):
            return f"{written(argument)}.reshape(m, 1{sizes})"
        return f"{written(argument)}.reshape(m, b{sizes})" if self.is_batched(argument) else written(argument)

    def pointwise(self) -> str | None:
        """See `Call.pointwise`."""
        found = super().pointwise()
        return None if found is None else f"{found}.flatten(0, 1)"


def _mm(call: MixedCall) -> str | None:
    a, b = call.args
    if not call.is_batched(a) or not call.is_of_gateways(b):
        return None
    rows, inner = call.of(a).shape
    return f"torch.bmm({written(a)}.reshape(m, -1, {inner}), {written(b)}).view(n, {rows}, {call.shape[1]})"


def _addmm(call: MixedCall) -> str | None:
    bias, a, b = call.args
    if call.kwargs or not call.is_of_gateways(b):
        return None
    if not call.is_batched(a):
        if call.is_of_gateways(a):
            return None
        product = f"torch.matmul({written(a)}, {written(b)}).unsqueeze(1)"
        return f"torch.add({call.aligned(bias, 2)}, {product}).flatten(0, 1)"
    rows, inner = call.of(a).shape
    shape = call.of(bias).shape
    if call.is_batched(bias) and shape == call.shape:
        added = f"{written(bias)}.reshape(m, -1, {shape[-1]})"
    elif call.is_batched(bias) or not same_for_rows(shape):
        product = f"torch.bmm({written(a)}.reshape(m, -1, {inner}), {written(b)}).view(m, b, {rows}, {call.shape[1]})"
        return f"torch.add({call.aligned(bias, 2)}, {product}).flatten(0, 1)"
    else:
        added = f"{written(bias)}.reshape({'m' if call.is_of_gateways(bias) else '1'}, 1, {shape[-1] if shape else 1})"
    product = f"torch.baddbmm({added}, {written(a)}.reshape(m, -1, {inner}), {written(b)})"
    return f"{product}.view(n, {rows}, {call.shape[1]})"


def _convolution(call: MixedCall) -> str | None:
    x, weight, bias, *rest = call.args
    if not call.is_batched(x) or call.is_batched(weight) or not call.is_of_gateways(weight) or call.of(x).shape[0] != 1:
        return None
    if bias is not None and not call.is_of_gateways(bias):
        return None
    return f"each_convolution({written(x)}, {written(weight)}, {written(bias)}, {written(rest)}, m)"


def _convolution_backward(call: MixedCall) -> str | None:
    grad, x, weight, _, *rest, mask = call.args
    if not call.is_of_gateways(weight) or call.of(x).shape[0] != 1:
        return None
    first = f"each_input_gradient({call.many(grad)}, {call.many(x)}, {written(weight)}, {written(rest)}, m)"
    return convolution_gradients(call, first if mask[0] else "None")


def _embedding(call: MixedCall) -> str | None:
    weight, tokens, *_ = call.args
    if not call.is_of_gateways(weight) or not call.is_batched(tokens):
        return None
    return f"each_embedding({written(weight)}, {written(tokens)}, m)"


def each_embedding(weight: torch.Tensor, tokens: torch.Tensor, m: int) -> torch.Tensor:
    """Return the rows of records' tokens `[n, …]` in their own gateway's table `[m, V, D]`: `[n, …, D]`.

    Raises:
        IndexError: A token is in no table; it would be a row of another gateway's.
    """
    _, rows, width = weight.shape
    lowest, highest = tokens.aminmax()
    if tokens.is_cuda:  # without waiting for it
        torch._assert_async((lowest >= 0) & (highest < rows))
    elif int(lowest) < 0 or int(highest) >= rows:
        raise IndexError(f"token {int(lowest if lowest < 0 else highest)} is in no table of {rows} rows")
    first = torch.arange(0, m * rows, rows, device=tokens.device).unsqueeze(1)
    own = (tokens.reshape(m, -1) + first).view(tokens.shape)
    return torch.embedding(weight.reshape(-1, width), own)


def each_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rest: Sequence[Any], m: int
) -> torch.Tensor:
    """Return the convolution of records `[n, 1, C, …]` with their own gateway's weight `[m, …]`."""
    images = x.squeeze(1).view(m, -1, *x.shape[2:])
    found = [
        torch.ops.aten.convolution(images[i], weight[i], None if bias is None else bias[i], *rest) for i in range(m)
    ]
    return torch.cat(found).unsqueeze(1)


def each_input_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rest: Sequence[Any], m: int
) -> torch.Tensor:
    """Return the input gradient `[n, 1, C, …]` of `each_convolution`."""
    grads, images = (part.squeeze(1).reshape(m, -1, *part.shape[2:]) for part in (grad, x))
    found = [
        torch.ops.aten.convolution_backward(grads[i], images[i], weight[i], None, *rest, [True, False, False])[0]
        for i in range(m)
    ]
    return torch.cat(found).unsqueeze(1)


MIXED: dict[str, Callable[[MixedCall], str | None]] = {
    "aten.mm.default": _mm,
    "aten.addmm.default": _addmm,
    "aten.convolution.default": _convolution,
    "aten.convolution_backward.default": _convolution_backward,
    "aten.embedding.default": _embedding,
}
"""By name of the operation; operations on single values need none."""
