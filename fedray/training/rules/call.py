"""The call of one operation, as the rules for many records see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fedray.training.program import Instruction, Spec, Value, values_in

Rule = Callable[["Call"], str | None]


def written(argument: Any) -> str:  # noqa: PLR0911 - one return a kind
    """Return an argument as Python source."""
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
    """The call of one operation, with helpers that write it for many records as Python source.

    Args:
        instruction: The operation.
        batched: Indices of the values that have a leading dimension of records.
        specs: Shape and type of each value, for one record.
        bound: Returns the name of an operator in the generated source.
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
        """Tell whether an argument, or a part of it, has a leading dimension of records."""
        return any(index in self._batched for index in values_in(argument))

    def of(self, argument: Any) -> Spec:
        """Return the shape and type of an argument, for one record."""
        return self._specs[argument.index]

    def rank(self, position: int = 0) -> int:
        """Return the number of dimensions of an argument, for one record."""
        return len(self.of(self.args[position]).shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape, for one record."""
        assert self.spec is not None
        return self.spec.shape

    @property
    def spec_dtype(self) -> torch.dtype:
        """The result's type."""
        assert self.spec is not None
        return self.spec.dtype

    def direct(self, *args: Any, op: str | None = None, **kwargs: Any) -> str:
        """Return the call with other arguments; strings among them are source."""
        parts = [one if isinstance(one, str) else written(one) for one in args]
        parts += [f"{key}={value if isinstance(value, str) else written(value)}" for key, value in kwargs.items()]
        return f"{self._bound(op or self.op)}({', '.join(parts)})"

    def many(self, argument: Any) -> str:
        """Return an argument with a leading dimension of records, repeated where it has none."""
        if self.is_batched(argument):
            return written(argument)
        shape = "".join(f", {size}" for size in self.of(argument).shape)
        return f"{written(argument)}.expand({self.n}{shape})"

    def packed(self, argument: Any) -> str:
        """Return `many` as contiguous memory, which some kernels take for granted."""
        return f"{self.many(argument)}.contiguous()"

    def aligned(self, argument: Any, rank: int) -> str:
        """Return an argument in a shape that broadcasts against results `[n, …]` of `rank` further dimensions."""
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
        """Return `merged` as contiguous memory, which some kernels take for granted."""
        return f"{self.merged(argument)}.contiguous()"
