"""How single operations run with the records' dimension in front; one function a kind of operation.

A rule gets a `Call` and returns the expression that gives the result, or None where it does not cover the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fedray.training.program import Instruction, Spec, Value, values_in

Rule = Callable[["Call"], str | None]


def written(argument: Any) -> str:  # noqa: PLR0911 - one return a kind
    """Return an argument as source."""
    if isinstance(argument, Value):
        return f"v{argument.index}"
    if isinstance(argument, list | tuple):
        return "[" + ", ".join(written(item) for item in argument) + "]"
    if isinstance(argument, dict):
        return "{" + ", ".join(f"{key!r}: {written(item)}" for key, item in argument.items()) + "}"
    if isinstance(argument, torch.dtype | torch.layout | torch.memory_format):
        return str(argument)
    if isinstance(argument, torch.device):
        return f"torch.device({str(argument)!r})"
    if isinstance(argument, float) and not math.isfinite(argument):
        return f"float({str(argument)!r})"
    return repr(argument)


class Call:
    """One operation's call, as rules see it.

    Args:
        instruction: The operation.
        batched: Values with the records' dimension in front.
        specs: Of single values.
        bound: Gives an operator's name in the source.
        n: The name of the number of records in the source.
    """

    def __init__(
        self,
        instruction: Instruction,
        batched: set[int],
        specs: Mapping[int, Spec],
        bound: Callable[[str], str],
        n: str = "n",
    ) -> None:
        self.n = n
        self.op, self.args, self.kwargs, self.spec = (
            instruction.op,
            instruction.args,
            instruction.kwargs,
            instruction.spec,
        )
        self._batched, self._specs, self._bound = batched, specs, bound

    def is_batched(self, argument: Any) -> bool:
        """Tell whether an argument, or a part of it, has records in front."""
        return any(index in self._batched for index in values_in(argument))

    def of(self, argument: Any) -> Spec:
        """Return the shape and type of an argument, for one record."""
        return self._specs[argument.index]

    def rank(self, position: int = 0) -> int:
        """Return the number of dimensions of an argument, for one record."""
        return len(self.of(self.args[position]).shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's, for one record."""
        assert self.spec is not None
        return self.spec.shape

    @property
    def spec_dtype(self) -> torch.dtype:
        """The result's."""
        assert self.spec is not None
        return self.spec.dtype

    def direct(self, *args: Any, op: str | None = None, **kwargs: Any) -> str:
        """Return the call with other arguments; strings are source."""
        parts = [one if isinstance(one, str) else written(one) for one in args]
        parts += [f"{key}={value if isinstance(value, str) else written(value)}" for key, value in kwargs.items()]
        return f"{self._bound(op or self.op)}({', '.join(parts)})"

    def many(self, argument: Any) -> str:
        """Return an argument with records in front, repeated where it has none."""
        if self.is_batched(argument):
            return written(argument)
        shape = "".join(f", {size}" for size in self.of(argument).shape)
        return f"{written(argument)}.expand({self.n}{shape})"

    def packed(self, argument: Any) -> str:
        """Return `many` in memory of its own shape, for kernels that take that for granted."""
        return f"{self.many(argument)}.contiguous()"

    def aligned(self, argument: Any, rank: int) -> str:
        """Return an argument so that it broadcasts against results of that many dimensions, records in front."""
        if not isinstance(argument, Value):
            return written(argument)
        spec = self.of(argument)
        if not self.is_batched(argument) or len(spec.shape) == rank:
            return written(argument)
        sizes = ", ".join(map(str, [1] * (rank - len(spec.shape)) + list(spec.shape)))
        return f"{written(argument)}.reshape({self.n}, {sizes})"

    def pointwise(self) -> str | None:
        """Return a call that works value by value."""
        if self.spec is None:
            return None
        rank = len(self.shape)
        args = [self.aligned(argument, rank) for argument in self.args]
        kwargs = {key: self.aligned(argument, rank) for key, argument in self.kwargs.items()}
        found = self.direct(*args, **kwargs)
        tensors = [self.of(one) for one in (*self.args, *self.kwargs.values()) if isinstance(one, Value)]
        if len({spec.dtype for spec in tensors}) > 1 and any(not spec.shape for spec in tensors):
            # A number of one record counts less for the result's type than a row of numbers.
            return f"{found}.to({self.spec.dtype})"
        return found

    def merged(self, argument: Any) -> str:
        """Return an argument whose first dimension is a batch already, with the records' dimension merged into it."""
        return f"{self.many(argument)}.{'squeeze(1)' if self.of(argument).shape[0] == 1 else 'flatten(0, 1)'}"

    def flat(self, argument: Any) -> str:
        """Return `merged` in memory of its own shape, for kernels that take that for granted."""
        return f"{self.merged(argument)}.contiguous()"


def _later(dim: int) -> int:
    return dim if dim < 0 else dim + 1


def _reshape(call: Call) -> str | None:
    sizes = "".join(f", {size}" for size in call.shape)
    return f"{written(call.args[0])}.reshape({call.n}{sizes})"


def _expand(call: Call) -> str | None:
    sizes = "".join(f", {size}" for size in call.shape)
    return f"{call.aligned(call.args[0], len(call.shape))}.expand({call.n}{sizes})"


def _dims(*positions: int) -> Rule:
    """Return the rule of operations some of whose arguments are dimensions."""

    def rule(call: Call) -> str | None:
        if any(call.is_batched(argument) for argument in call.args[1:]) or call.is_batched(call.kwargs):
            return None
        if call.rank() == 0:
            return None
        args = list(call.args)
        for position in positions:
            if position < len(args) and isinstance(args[position], int):
                args[position] = _later(args[position])
            elif position < len(args) and isinstance(args[position], list | tuple):
                args[position] = [_later(dim) for dim in args[position]]
        return call.direct(*args, **call.kwargs)

    return rule


def _reduction(call: Call) -> str | None:
    """Reductions over the dimensions in args[1]; all of them when there is none."""
    rank = call.rank()
    dims = call.args[1]
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        dims = list(range(-rank, 0))
    dims = [dims] if isinstance(dims, int) else dims
    if rank == 0:
        return None
    sums = ("aten.sum.dim_IntList", "aten.mean.dim", "aten.amax.default", "aten.amin.default")
    if call.op in sums and not call.kwargs and all(call.of(call.args[0]).shape[dim] == 1 for dim in dims):
        # Sums of truth values are whole numbers.
        typed = "" if call.of(call.args[0]).dtype == call.spec_dtype else f".to({call.spec_dtype})"
        return f"{_reshape(call)}{typed}"
    return call.direct(call.args[0], [_later(dim) for dim in dims], *call.args[2:], **call.kwargs)


def _one_dim(call: Call) -> str | None:
    """Reductions over one dimension, given as a number; without one they are left to vmap."""
    if not isinstance(call.args[1], int) or call.rank() == 0:
        return None
    return call.direct(call.args[0], _later(call.args[1]), *call.args[2:], **call.kwargs)


def _whole(name: str) -> Rule:
    """Return the rule of a reduction over everything."""

    def rule(call: Call) -> str | None:
        if call.rank() == 0:
            return f"{written(call.args[0])}.to({call.spec_dtype})" if not call.kwargs else None
        return call.direct(call.args[0], list(range(-call.rank(), 0)), False, op=name, **call.kwargs)

    return rule


def _permute(call: Call) -> str | None:
    rank = call.rank()
    return call.direct(call.args[0], [0, *(dim % rank + 1 for dim in call.args[1])])


def _transpose(call: Call) -> str | None:
    rank = call.rank()
    return f"{written(call.args[0])}.transpose({call.args[1] % rank + 1}, {call.args[2] % rank + 1})"


def _turn(call: Call) -> str | None:
    return f"{written(call.args[0])}.transpose(-1, -2)" if call.rank() == 2 else written(call.args[0])


def _joined(call: Call) -> str | None:
    parts = "[" + ", ".join(call.many(part) for part in call.args[0]) + "]"
    return call.direct(parts, _later(call.args[1]))


def _sized(call: Call) -> str | None:
    """Backward passes of views: a gradient, the input's sizes, a dimension and more."""
    grad, sizes, dim, *rest = call.args
    whole = f"[{call.n}" + "".join(f", {size}" for size in sizes) + "]"
    return call.direct(grad, whole, _later(dim), *rest)


def _mm(call: Call) -> str | None:
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
    """Tell whether what is added to a matrix is the same in each of its rows."""
    return len(shape) < 2 or shape[0] == 1


def _addmm(call: Call) -> str | None:
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


def _bmm(call: Call) -> str | None:
    a, b = call.args
    if not (call.is_batched(a) and call.is_batched(b)):
        return f"torch.matmul({written(a)}, {written(b)})"
    sizes = "".join(f", {size}" for size in call.shape)
    if call.shape[0] == 1:
        return f"torch.bmm({written(a)}.squeeze(1), {written(b)}.squeeze(1)).unsqueeze(1)"
    return f"torch.bmm({written(a)}.flatten(0, 1), {written(b)}.flatten(0, 1)).view({call.n}{sizes})"


def _leading(call: Call) -> str | None:
    """Operations that take any number of dimensions in front of those they work on."""
    first, *others = call.args
    if not call.is_batched(first):
        return None
    # Other tensors are of records, too, or constants that broadcast from the right.
    return call.direct(call.packed(first), *others, **call.kwargs)


def _copied(call: Call) -> str | None:
    named = {name: value for name, value in call.kwargs.items() if name != "memory_format"}  # of a record's rank
    return call.direct(call.args[0], **named)


def _layer_norm_backward(call: Call) -> str | None:
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


def _group_norm(call: Call) -> str | None:
    x, weight, bias, number, channels, size, groups, eps = call.args
    if weight is not None or bias is not None:
        return None
    flat = call.direct(call.flat(x), None, None, f"{call.n} * {number}", channels, size, groups, eps)
    shape = "".join(f", {one}" for one in call.of(x).shape)
    few = f"{call.n}, {number}, {groups}"
    return f"(lambda r: (r[0].view({call.n}{shape}), r[1].view({few}), r[2].view({few})))({flat})"


def _group_norm_backward(call: Call) -> str | None:
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


def _images(call: Call, spatial: int) -> bool:
    """Tell whether the first argument is a batch of images of one record (and not one image)."""
    return call.rank() == spatial + 2


def _pool(spatial: int, tensors: int = 1) -> Rule:
    """Return the rule of pooling and the like: `tensors` leading arguments are batches, results too."""

    def rule(call: Call) -> str | None:
        own = call.args[:tensors]
        if not _images(call, spatial) or any(call.rank(i) != spatial + 2 for i in range(tensors)):
            return None
        more = [call.flat(argument) if isinstance(argument, Value) else argument for argument in call.args[tensors:]]
        flat = call.direct(*(call.flat(argument) for argument in own), *more, **call.kwargs)
        number = call.of(own[0]).shape[0]
        if call.spec is not None:
            return f"(lambda r: r.view({call.n}, {number}, *r.shape[1:]))({flat})"
        return f"tuple(r.view({call.n}, {number}, *r.shape[1:]) for r in {flat})"

    return rule


def _max_pool2d(call: Call) -> str | None:
    """Channels last: the kernel for that layout is six times as fast on a CPU."""
    if not _images(call, 2):
        return None
    x, *rest = call.args
    flat = call.direct(f"{call.merged(x)}.contiguous(memory_format=torch.channels_last)", *rest)
    return f"tuple(r.view({call.n}, {call.of(x).shape[0]}, *r.shape[1:]) for r in {flat})"


def _max_pool2d_backward(call: Call) -> str | None:
    grad, x, *rest, indices = call.args
    if not _images(call, 2) or call.rank(1) != 4:
        return None
    flat = f"max_pool2d_backward({call.merged(grad)}, {call.merged(x)}, {written(rest)}, {call.merged(indices)})"
    return f"(lambda r: r.view({call.n}, {call.of(x).shape[0]}, *r.shape[1:]))({flat})"


def max_pool2d_backward(
    grad: torch.Tensor, x: torch.Tensor, rest: Sequence[Any], indices: torch.Tensor
) -> torch.Tensor:
    """Return the input gradient of `_max_pool2d`, laid out as x is."""
    last = torch.channels_last
    # Of x the kernel takes size and layout.
    shaped = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=last)
    found: torch.Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        grad.contiguous(memory_format=last), shaped, *rest, indices.contiguous(memory_format=last)
    )
    return found.contiguous() if x.is_contiguous() else found


def _convolution(call: Call) -> str | None:
    x, weight, bias, *rest = call.args
    if not call.is_batched(x) or call.is_batched(weight) or call.is_batched(bias):
        return None
    number = call.of(x).shape[0]
    flat = call.direct(call.merged(x), weight, bias, *rest)
    return f"(lambda r: r.view({call.n}, {number}, *r.shape[1:]))({flat})"


def _convolution_backward(call: Call) -> str | None:
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


def _embedding(call: Call) -> str | None:
    weight, tokens, *_ = call.args
    if not call.is_batched(tokens):
        return f"{written(weight)}[:, {written(tokens)}]"
    if call.is_batched(weight):
        return None
    return f"torch.embedding({written(weight)}, {written(tokens)})"


def _embedding_backward(call: Call) -> str | None:
    grad, tokens, number, padding, by_frequency = call.args
    if by_frequency:
        return None
    width = call.shape[1]
    keep = f".masked_fill((t == {padding}).unsqueeze(2), 0.0)" if padding >= 0 else ""
    body = f"g.new_zeros({call.n}, {number}, {width}).scatter_add_(1, t.unsqueeze(2).expand(-1, -1, {width}), g{keep})"
    return f"(lambda t, g: {body})({call.many(tokens)}.reshape({call.n}, -1), {call.many(grad)}.reshape({call.n}, -1, {width}))"


def _nll(call: Call) -> str | None:
    scores, target, weight, reduction, ignored = call.args
    if reduction != 0 or call.is_batched(weight) or call.rank() != 2:
        return None
    flat = call.direct(call.flat(scores), call.flat(target), weight, reduction, ignored)
    return f"(lambda r: (r[0].view({call.n}, {call.of(scores).shape[0]}), r[1]))({flat})"


def _nll_backward(call: Call) -> str | None:
    grad, scores, target, weight, reduction, ignored, _total = call.args
    if reduction != 0 or call.is_batched(weight) or call.rank(1) != 2:
        return None
    rows, classes = call.of(scores).shape
    total = f"{written(scores)}.new_zeros(())"
    flat = call.direct(call.flat(grad), call.flat(scores), call.flat(target), weight, reduction, ignored, total)
    return f"{flat}.view({call.n}, {rows}, {classes})"


def _index(call: Call) -> str | None:
    """A constant table looked up by indices of records, in its first dimensions."""
    table, indices = call.args
    if call.is_batched(table) or any(one is None for one in indices):
        return None
    ranks = {len(call.of(one).shape) for one in indices}
    if len(ranks) > 1 or not all(call.is_batched(one) for one in indices):
        return None
    return call.direct(table, indices)


def _gather(call: Call) -> str | None:
    x, dim, index, *rest = call.args
    if call.rank() == 0 or call.of(index).shape == ():
        return None
    parts = [call.many(one) if isinstance(one, Value) and call.of(one).shape else one for one in rest]
    if any(isinstance(one, Value) and call.is_batched(one) and not call.of(one).shape for one in rest):
        return None
    return call.direct(call.many(x), _later(dim), call.many(index), *parts, **call.kwargs)


def _repeat(call: Call) -> str | None:
    sizes = call.args[1]
    return call.direct(call.aligned(call.args[0], len(sizes)), [1, *sizes])


_A = "aten."
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        [
            _A + name
            for name in (
                "view.default",
                "_unsafe_view.default",
                "reshape.default",
                "unsqueeze.default",
                "squeeze.default",
                "squeeze.dim",
                "squeeze.dims",
            )
        ],
        _reshape,
    ),
    "aten.expand.default": _expand,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.t.default": _turn,
    "aten.select.int": _dims(1),
    "aten.slice.Tensor": _dims(1),
    "aten.split.Tensor": _dims(2),
    "aten.split_with_sizes.default": _dims(2),
    "aten.unbind.int": _dims(1),
    "aten.flip.default": _dims(1),
    "aten.index_select.default": _dims(1),
    "aten.cumsum.default": _dims(1),
    "aten._softmax.default": _dims(1),
    "aten._log_softmax.default": _dims(1),
    "aten.cat.default": _joined,
    "aten.stack.default": _joined,
    "aten.slice_backward.default": _sized,
    "aten.select_backward.default": _sized,
    "aten.sum.dim_IntList": _reduction,
    "aten.mean.dim": _reduction,
    "aten.amax.default": _reduction,
    "aten.amin.default": _reduction,
    "aten.logsumexp.default": _reduction,
    "aten.var.correction": _reduction,
    "aten.any.dim": _one_dim,
    "aten.all.dim": _one_dim,
    "aten.argmax.default": _one_dim,
    "aten.argmin.default": _one_dim,
    "aten.max.dim": _one_dim,
    "aten.min.dim": _one_dim,
    "aten.sum.default": _whole("aten.sum.dim_IntList"),
    "aten.mean.default": _whole("aten.mean.dim"),
    "aten.mm.default": _mm,
    "aten.addmm.default": _addmm,
    "aten.bmm.default": _bmm,
    "aten.constant_pad_nd.default": _leading,
    "aten.tril.default": _leading,
    "aten.triu.default": _leading,
    "aten._to_copy.default": _copied,
    "aten.native_layer_norm.default": lambda call: (
        _leading(call) if call.args[2] is None and call.args[3] is None else None
    ),
    "aten.native_layer_norm_backward.default": _layer_norm_backward,
    "aten.native_group_norm.default": _group_norm,
    "aten.native_group_norm_backward.default": _group_norm_backward,
    "aten.convolution.default": _convolution,
    "aten.convolution_backward.default": _convolution_backward,
    "aten.max_pool2d_with_indices.default": _max_pool2d,
    "aten.max_pool2d_with_indices_backward.default": _max_pool2d_backward,
    "aten.max_pool3d_with_indices.default": _pool(3),
    "aten.max_pool3d_with_indices_backward.default": _pool(3, 2),
    "aten.avg_pool2d.default": _pool(2),
    "aten.avg_pool2d_backward.default": _pool(2, 2),
    "aten.avg_pool3d.default": _pool(3),
    "aten.avg_pool3d_backward.default": _pool(3, 2),
    "aten._adaptive_avg_pool2d.default": _pool(2),
    "aten._adaptive_avg_pool2d_backward.default": _pool(2, 2),
    "aten.embedding.default": _embedding,
    "aten.embedding_dense_backward.default": _embedding_backward,
    "aten.nll_loss_forward.default": _nll,
    "aten.nll_loss_backward.default": _nll_backward,
    "aten.index.Tensor": _index,
    "aten.gather.default": _gather,
    "aten.scatter_add.default": _gather,
    "aten.scatter.src": _gather,
    "aten.scatter.value": _gather,
    "aten.repeat.default": _repeat,
}
"""By name of the operation; operations on single values need none."""


def _softmax_backward(call: Call) -> str | None:
    grad, output, dim, dtype = call.args
    if call.rank() == 0:
        return None
    return call.direct(call.many(grad), call.many(output), _later(dim), dtype)


RULES["aten._softmax_backward_data.default"] = _softmax_backward
RULES["aten._log_softmax_backward_data.default"] = _softmax_backward
