"""A program for one record as a function of many: operation by operation, each by a rule that keeps records apart.

A value that depends on the record gets a dimension in front, of as many records as there are; what depends on parameters
and constants alone stays as it is. Each rule says how its operation runs with that dimension; an operation without a rule
is mapped over it by torch.vmap. That rules keep records apart is tested for each of them against torch.vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedray.training.batching_rules import RULES, Call
from fedray.training.program import Instruction, Program, Value, operator, replaced, values_in

Run = Callable[..., tuple[Any, ...]]


class Batched:
    """A program that runs on any number of records at once.

    Args:
        program: For one record.
        own_params: Whether each record has parameters of its own, `[n, …]`.
    """

    def __init__(self, program: Program, own_params: bool = False) -> None:
        self.program = program
        self.wanted = program.wanted()
        self.mapped: list[str] = []  # operations without a rule
        self._bindings: dict[str, Any] = {"torch": torch, "mapped": _mapped}
        self.batched = {*range(program.first_draw, program.num_values)}
        if own_params:
            self.batched |= {*range(len(program.params))}
        lines = self._lines()
        source = "def run(params, constants, draws, inputs, target, n):\n" + "".join(f"    {line}\n" for line in lines)
        self.source = source
        exec(compile(source, "<batched program>", "exec"), self._bindings)
        self.run: Run = self._bindings["run"]

    def is_batched(self, index: int) -> bool:
        """Tell whether a value has the records' dimension in front."""
        return index in self.batched

    def _lines(self) -> list[str]:
        program = self.program
        names = {index: f"v{index}" for index in range(program.num_values + len(program.instructions))}
        last: dict[int, int] = {}
        for position, instruction in enumerate(program.instructions):
            for index in values_in((instruction.args, instruction.kwargs)):
                last[index] = position
        kept = set(self.wanted)
        used = {*last, *kept}
        lines = []
        for where, first, number in (
            ("params", 0, len(program.params)),
            ("constants", program.first_constant, len(program.constants)),
            ("draws", program.first_draw, len(program.draws)),
            ("inputs", program.first_input, program.num_inputs),
        ):
            lines += [f"v{first + i} = {where}[{i}]" for i in range(number) if first + i in used]
        lines.append(f"v{program.num_values - 1} = target")
        for position, instruction in enumerate(program.instructions):
            lines.append(f"v{instruction.out} = {self._expression(instruction)}")
            done = [i for i, end in last.items() if end == position and i not in kept and i >= program.num_values]
            if done:
                lines.append(" = ".join(names[index] for index in sorted(done)) + " = None")
        lines.append("return (" + "".join(f"v{index}, " for index in self.wanted) + ")")
        return lines

    def _expression(self, instruction: Instruction) -> str:
        sources = [*values_in((instruction.args, instruction.kwargs))]
        if not any(index in self.batched for index in sources):
            if instruction.op == "getitem":
                return f"v{sources[0]}[{instruction.args[1]}]"
            return f"{self._bound(instruction.op)}({_written(instruction.args, instruction.kwargs)})"
        self.batched.add(instruction.out)
        if instruction.op == "getitem":
            return f"v{sources[0]}[{instruction.args[1]}]"
        call = Call(instruction, self.batched, self.program.specs, self._bound)
        rule = RULES.get(instruction.op)
        found = rule(call) if rule is not None else None
        if found is None and torch.Tag.pointwise in operator(instruction.op).tags:
            found = call.pointwise()
        if found is None:
            self.mapped.append(instruction.op)
            dims = replaced((instruction.args, instruction.kwargs), lambda index: _Dim(index in self.batched))
            name = f"dims{instruction.out}"
            self._bindings[name] = dims
            args = _written((list(instruction.args), dict(instruction.kwargs)), {})
            found = f"mapped({self._bound(instruction.op)}, {name}, {args})"
        return found

    def _bound(self, op: str) -> str:
        name = op.replace(".", "_")
        if name not in self._bindings:
            self._bindings[name] = operator(op)._op  # the overload itself: a Python call less
        return name


class _Dim:
    """Marks where a mapped operation's arguments have records in front."""

    def __init__(self, batched: bool) -> None:
        self.batched = batched


def _mapped(op: Callable[..., Any], dims: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation on each record by torch.vmap."""
    tensors: list[Any] = []
    in_dims: list[int | None] = []

    def collect(mark: Any, value: Any) -> Any:
        if isinstance(mark, _Dim):
            tensors.append(value)
            in_dims.append(0 if mark.batched else None)
            return Value(len(tensors) - 1)
        if isinstance(mark, tuple | list):
            return [collect(one, item) for one, item in zip(mark, value, strict=True)]
        if isinstance(mark, dict):
            return {key: collect(one, value[key]) for key, one in mark.items()}
        return value

    args, kwargs = collect(list(dims), [args, kwargs])

    def one(*own: Any) -> Any:
        return op(*replaced(args, lambda index: own[index]), **replaced(kwargs, lambda index: own[index]))

    return torch.vmap(one, in_dims=tuple(in_dims))(*tensors)


def _written(args: Any, kwargs: Any) -> str:
    from fedray.training.batching_rules import written

    parts = [written(argument) for argument in args] + [f"{key}={written(value)}" for key, value in kwargs.items()]
    return ", ".join(parts)
