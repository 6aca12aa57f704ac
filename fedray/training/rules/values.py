"""Rules of operations on shapes, single values and sums."""

from __future__ import annotations

from fedray.training.program import Value
from fedray.training.rules.call import Call, Rule, written


def later(dim: int) -> int:
    """Return a record's dimension as counted behind the leading one."""
    return dim if dim < 0 else dim + 1


def reshape(call: Call) -> str | None:
    """Views and reshapes to the result's shape."""
    sizes = "".join(f", {size}" for size in call.shape)
    return f"{written(call.args[0])}.reshape({call.n}{sizes})"


def expand(call: Call) -> str | None:
    """Repetition of dimensions of size 1 without a copy."""
    sizes = "".join(f", {size}" for size in call.shape)
    return f"{call.aligned(call.args[0], len(call.shape))}.expand({call.n}{sizes})"


def dims(*positions: int) -> Rule:
    """Return the rule of operations whose arguments at these positions are dimensions."""

    def rule(call: Call) -> str | None:
        if any(call.is_batched(argument) for argument in call.args[1:]) or call.is_batched(call.kwargs):
            return None
        if call.rank() == 0:
            return None
        args = list(call.args)
        for position in positions:
            if position < len(args) and isinstance(args[position], int):
                args[position] = later(args[position])
            elif position < len(args) and isinstance(args[position], list | tuple):
                args[position] = [later(dim) for dim in args[position]]
        return call.direct(*args, **call.kwargs)

    return rule


def reduction(call: Call) -> str | None:
    """Reductions over the dimensions in args[1], or over all of them when it is empty."""
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
        return f"{reshape(call)}{typed}"
    return call.direct(call.args[0], [later(dim) for dim in dims], *call.args[2:], **call.kwargs)


def one_dim(call: Call) -> str | None:
    """Reductions over one dimension, given as a number; without one they run record by record."""
    if not isinstance(call.args[1], int) or call.rank() == 0:
        return None
    return call.direct(call.args[0], later(call.args[1]), *call.args[2:], **call.kwargs)


def full_reduction(name: str) -> Rule:
    """Return the rule of a reduction over all dimensions, by the operation `name` that takes dimensions."""

    def rule(call: Call) -> str | None:
        if call.rank() == 0:
            return f"{written(call.args[0])}.to({call.spec_dtype})" if not call.kwargs else None
        return call.direct(call.args[0], list(range(-call.rank(), 0)), False, op=name, **call.kwargs)

    return rule


def permute(call: Call) -> str | None:
    """A new order of the dimensions."""
    rank = call.rank()
    return call.direct(call.args[0], [0, *(dim % rank + 1 for dim in call.args[1])])


def transpose(call: Call) -> str | None:
    """Two dimensions swapped."""
    rank = call.rank()
    return f"{written(call.args[0])}.transpose({call.args[1] % rank + 1}, {call.args[2] % rank + 1})"


def matrix_transpose(call: Call) -> str | None:
    """A matrix transposed; vectors stay as they are."""
    return f"{written(call.args[0])}.transpose(-1, -2)" if call.rank() == 2 else written(call.args[0])


def joined(call: Call) -> str | None:
    """Tensors joined along a dimension."""
    parts = "[" + ", ".join(call.many(part) for part in call.args[0]) + "]"
    return call.direct(parts, later(call.args[1]))


def view_backward(call: Call) -> str | None:
    """Backward passes of views, whose arguments are a gradient, the input's sizes, a dimension and more."""
    grad, sizes, dim, *rest = call.args
    whole = f"[{call.n}" + "".join(f", {size}" for size in sizes) + "]"
    return call.direct(grad, whole, later(dim), *rest)


def leading(call: Call) -> str | None:
    """Operations that take any number of leading dimensions before those they work on."""
    first, *others = call.args
    if not call.is_batched(first):
        return None
    # Other tensors are of records, too, or constants that broadcast from the right.
    return call.direct(call.packed(first), *others, **call.kwargs)


def value_by_value(reduction: int | None = None) -> Rule:
    """Return the rule of operations on values in the same place of equally shaped tensors.

    Args:
        reduction: Position of the argument that says how losses are reduced; they must not be.
    """

    def rule(call: Call) -> str | None:
        tensors = [one for one in (*call.args, *call.kwargs.values()) if isinstance(one, Value)]
        if call.spec is None or any(call.of(one).shape != call.shape for one in tensors):
            return None
        if reduction is not None and call.args[reduction] != 0:
            return None
        args = [call.many(one) if isinstance(one, Value) else one for one in call.args]
        return call.direct(*args, **call.kwargs)

    return rule


def log_sigmoid(call: Call) -> str | None:
    """Logarithm of the sigmoid, which needs contiguous memory."""
    return call.direct(call.packed(call.args[0]))


def glu_backward(call: Call) -> str | None:
    """The input gradient of the gated linear unit."""
    grad, x, dim = call.args
    return call.direct(call.many(grad), call.many(x), later(dim))


def copied(call: Call) -> str | None:
    """Copies; a memory format is dropped, as it is one of a record's rank."""
    named = {name: value for name, value in call.kwargs.items() if name != "memory_format"}
    return call.direct(call.args[0], **named)


def index(call: Call) -> str | None:
    """Look-ups in a table that is the same for all records, by each record's indices in its first dimensions."""
    table, indices = call.args
    if call.is_batched(table) or any(one is None for one in indices):
        return None
    ranks = {len(call.of(one).shape) for one in indices}
    if len(ranks) > 1 or not all(call.is_batched(one) for one in indices):
        return None
    return call.direct(table, indices)


def gather(call: Call) -> str | None:
    """Values picked along a dimension by indices, and the writes to such places."""
    x, dim, index, *rest = call.args
    if call.rank() == 0 or call.of(index).shape == ():
        return None
    parts = [call.many(one) if isinstance(one, Value) and call.of(one).shape else one for one in rest]
    if any(isinstance(one, Value) and call.is_batched(one) and not call.of(one).shape for one in rest):
        return None
    return call.direct(call.many(x), later(dim), call.many(index), *parts, **call.kwargs)


def repeat(call: Call) -> str | None:
    """Tensors tiled."""
    sizes = call.args[1]
    return call.direct(call.aligned(call.args[0], len(sizes)), [1, *sizes])


def softmax_backward(call: Call) -> str | None:
    """The input gradient of softmax and its logarithm."""
    grad, output, dim, dtype = call.args
    if call.rank() == 0:
        return None
    return call.direct(call.many(grad), call.many(output), later(dim), dtype)
