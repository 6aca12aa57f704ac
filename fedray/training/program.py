"""The computation of one record's loss and gradient as plain data: a list of torch operations and the results wanted.

A program is made by tracing the user's model and loss on a single record (`fedray.training.tracing`), so it holds nothing
of the user's code: whatever that code looks at, it saw one record. It pickles, and knows nothing of batches or gateways.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch


class Untraceable(Exception):
    """A model or loss cannot be run on one record; the message says why and what to do."""


@dataclass(frozen=True)
class Value:
    """A reference to an input or to the result of an instruction, in an instruction's arguments."""

    index: int


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Shape and type of one value, as the single record gives it.

    Args:
        shape: Sizes.
        dtype: Type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One operation.

    Args:
        op: Its name, as in "aten.add.Tensor"; "getitem" takes one of several results.
        args: Positional arguments; values are `Value`.
        kwargs: Keyword arguments.
        out: Index of the result.
        spec: Of the result; None when there are several.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int
    spec: Spec | None


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Random numbers that a record's forward pass takes.

    Args:
        law: "uniform" in [0, 1), or "normal".
        shape: Sizes, for one record.
    """

    law: Literal["uniform", "normal"]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A weight whose per-record gradient need not be stored: it follows from the layer's input a and output gradient e.

    Args:
        kind: "matrix": the gradient of `[out, in]` is eᵀa, for a `[S, in]` and e `[S, out]`. "transposed": that of
            `[in, out]` is aᵀe. "rows": e's rows are added to the rows a (token indices) of `[V, D]`.
        param: Which trainable parameter.
        inputs: Indices of the values a; those of several uses are joined along S.
        gradients: Indices of the values e, one for each a.
        padding: Of "rows": the row that gets no gradient, or None.
    """

    kind: Literal["matrix", "transposed", "rows"]
    param: int
    inputs: tuple[int, ...]
    gradients: tuple[int, ...]
    padding: int | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """Everything needed to compute one record's gradient.

    Values are numbered: trainable parameters first, in the layout's order, then constants, draws, the leaves of x, the
    leaf y, and the results of the instructions.

    Args:
        params: Shapes of the trainable parameters.
        constants: Frozen parameters, buffers and other tensors that the code holds; the same for all records.
        draws: Random numbers that the forward pass takes.
        num_inputs: How many leaves x has.
        instructions: In order.
        gradients: For each trainable parameter, the index of its gradient; None where sites give all of it, or where the
            loss does not depend on it.
        sites: See `Site`.
    """

    params: tuple[tuple[int, ...], ...]
    constants: tuple[torch.Tensor, ...]
    draws: tuple[Draw, ...]
    num_inputs: int
    instructions: tuple[Instruction, ...]
    gradients: tuple[int | None, ...]
    sites: tuple[Site, ...]
    specs: dict[int, Spec] = field(default_factory=dict)

    @property
    def first_constant(self) -> int:
        """Index of the first constant."""
        return len(self.params)

    @property
    def first_draw(self) -> int:
        """Index of the first draw."""
        return self.first_constant + len(self.constants)

    @property
    def first_input(self) -> int:
        """Index of the first leaf of x; y follows the last one."""
        return self.first_draw + len(self.draws)

    @property
    def num_values(self) -> int:
        """How many values are there before the first instruction's."""
        return self.first_input + self.num_inputs + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides what it computes, the values of its constants included."""
        found = hashlib.sha256(repr((self.params, self.draws, self.instructions, self.gradients, self.sites)).encode())
        for constant in self.constants:
            values = constant.detach().cpu().clone(memory_format=torch.contiguous_format)  # views may lack strides
            found.update(f"{values.dtype}{tuple(values.shape)}".encode())
            found.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def wanted(self) -> tuple[int, ...]:
        """Return the indices of the values to compute: gradients, then each site's inputs and gradients."""
        found = [index for index in self.gradients if index is not None]
        for site in self.sites:
            found += [*site.inputs, *site.gradients]
        return tuple(dict.fromkeys(found))


def values_in(arguments: Any) -> Iterator[int]:
    """Yield the indices of the values in an instruction's arguments."""
    if isinstance(arguments, Value):
        yield arguments.index
    elif isinstance(arguments, tuple | list):
        for item in arguments:
            yield from values_in(item)
    elif isinstance(arguments, dict):
        for item in arguments.values():
            yield from values_in(item)


def replaced(arguments: Any, new: Callable[[int], Any]) -> Any:
    """Return arguments with each value replaced by what `new` gives for its index."""
    if isinstance(arguments, Value):
        return new(arguments.index)
    if isinstance(arguments, tuple | list):
        return type(arguments)(replaced(item, new) for item in arguments)
    if isinstance(arguments, dict):
        return {key: replaced(item, new) for key, item in arguments.items()}
    return arguments


def operator(name: str) -> Any:
    """Return the torch operator of a name such as "aten.add.Tensor"."""
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
