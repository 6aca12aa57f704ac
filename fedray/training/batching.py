"""Runs a program that was traced on one record on many records at once, without mixing them.

Each operation runs by a rule that keeps records apart. A value that depends on the record gets a leading dimension of
all n records; one that depends on a gateway's parameters alone, one of the m gateways; constants stay as they are.
Records lie gateway after gateway, b each, so n = m·b. An operation without a rule runs once for each record. Tests
compare every rule with single records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from fedray.training.gateway_rules import MIXED, MixedCall, each_convolution, each_embedding, each_input_gradient
from fedray.training.program import Instruction, Program, operator, replaced, values_in
from fedray.training.rules.call import Call, written
from fedray.training.rules.images import max_pool2d_backward
from fedray.training.rules.table import RULES, VALUE_BY_VALUE

Run = Callable[..., tuple[Any, ...]]
Params = Literal["shared", "gateways", "records"]


class Batched:
    """Runs a program for one record on any number of records at once.

    `run(params, constants, draws, inputs, target, n, m, b)` returns the values `wanted`. `most_values` is how many values a
    record holds at once, at most.

    Args:
        program: What one record's gradient takes.
        params: Whether parameters are the same for all records, or have a leading dimension of gateways or of records.
    """

    def __init__(self, program: Program, params: Params = "shared") -> None:
        self.program = program
        self.wanted = program.wanted()
        self.without_rule: list[str] = []
        self.of_records = {*range(program.first_draw, program.num_values)}
        self.of_gateways: set[int] = set()
        own = range(len(program.params))
        self.of_records.update(own if params == "records" else ())
        self.of_gateways.update(own if params == "gateways" else ())
        self._names: dict[str, Any] = {
            "torch": torch,
            "each": _each,
            "each_embedding": each_embedding,
            "each_convolution": each_convolution,
            "max_pool2d_backward": max_pool2d_backward,
            "each_input_gradient": each_input_gradient,
        }
        source = "def run(params, constants, draws, inputs, target, n, m, b):\n" + "".join(
            f"    {line}\n" for line in self._lines()
        )
        exec(compile(source, "<batched program>", "exec"), self._names)
        self.source = source
        self.run: Run = self._names["run"]

    def expanded(self, values: Mapping[int, torch.Tensor], index: int, m: int, b: int) -> torch.Tensor:
        """Return a value with a leading dimension of records, repeated where it has none: `[n, …]`."""
        value = values[index]
        if index in self.of_records:
            return value
        if index in self.of_gateways:
            return value.unsqueeze(1).expand(m, b, *value.shape[1:]).flatten(0, 1)
        return value.expand(m * b, *value.shape)

    def _lines(self) -> list[str]:
        program = self.program
        last: dict[int, int] = {}
        for position, instruction in enumerate(program.instructions):
            for index in values_in((instruction.args, instruction.kwargs)):
                last[index] = position
        kept = set(self.wanted)
        lines = []
        held, self.most_values = 0, 0
        for where, first, number in (
            ("params", 0, len(program.params)),
            ("constants", program.first_constant, len(program.constants)),
            ("draws", program.first_draw, len(program.draws)),
            ("inputs", program.first_input, program.num_inputs),
        ):
            lines += [f"v{first + i} = {where}[{i}]" for i in range(number) if first + i in {*last, *kept}]
        lines.append(f"v{program.num_values - 1} = target")
        for position, instruction in enumerate(program.instructions):
            lines.append(f"v{instruction.out} = {self._expression(instruction)}")
            held += self._size(instruction.out)
            self.most_values = max(self.most_values, held)
            done = [i for i, end in last.items() if end == position and i not in kept and i >= program.num_values]
            held -= sum(map(self._size, done))
            if done:
                lines.append("".join(f"v{index} = " for index in sorted(done)) + "None")
        lines.append("return (" + "".join(f"v{index}, " for index in self.wanted) + ")")
        return lines

    def _size(self, index: int) -> int:
        """Return how many values of one record an instruction's result holds; views count as if they were copies."""
        spec = self.program.specs.get(index)
        return math.prod(spec.shape) if spec is not None and index in self.of_records else 0

    def _expression(self, instruction: Instruction) -> str:
        sources = {*values_in((instruction.args, instruction.kwargs))}
        records, gateways = sources & self.of_records, sources & self.of_gateways
        if records:
            self.of_records.add(instruction.out)
        elif gateways:
            self.of_gateways.add(instruction.out)
        if instruction.op == "getitem":
            return f"{written(instruction.args[0])}[{instruction.args[1]}]"
        if not records and not gateways:
            if instruction.op in ("aten.view.default", "aten._unsafe_view.default"):  # copies before it were dropped
                return f"{written(instruction.args[0])}.reshape({written(instruction.args[1])})"
            arguments = [written(one) for one in instruction.args]
            arguments += [f"{name}={written(value)}" for name, value in instruction.kwargs.items()]
            return f"{self._bound(instruction.op)}({', '.join(arguments)})"
        found = self._by_rule(instruction, bool(records), bool(gateways))
        return self._one_by_one(instruction) if found is None else found

    def _by_rule(self, instruction: Instruction, records: bool, gateways: bool) -> str | None:
        specs, pointwise = self.program.specs, torch.Tag.pointwise in operator(instruction.op).tags
        if records and gateways:
            mixed = MixedCall(instruction, self.of_records, self.of_gateways, specs, self._bound)
            rule = MIXED.get(instruction.op, VALUE_BY_VALUE.get(instruction.op))
            return rule(mixed) if rule is not None else mixed.pointwise() if pointwise else None
        batched, n = (self.of_records, "n") if records else (self.of_gateways, "m")
        call = Call(instruction, batched, specs, self._bound, n)
        found = RULES[instruction.op](call) if instruction.op in RULES else None
        return call.pointwise() if found is None and pointwise else found

    def _one_by_one(self, instruction: Instruction) -> str:
        self.without_rule.append(instruction.op)

        def mark(index: int) -> _Place:
            return _Place("n" if index in self.of_records else "m" if index in self.of_gateways else "")

        name = f"places{instruction.out}"
        self._names[name] = replaced((list(instruction.args), dict(instruction.kwargs)), mark)
        args = f"{written(list(instruction.args))}, {written(dict(instruction.kwargs))}"
        return f"each({self._bound(instruction.op)}, {name}, {args}, n, b)"

    def _bound(self, op: str) -> str:
        name = op.replace(".", "_")
        if name not in self._names:
            self._names[name] = operator(op)._op  # the overload itself: a Python call less
        return name


class _Place:
    """Marks where the arguments of an operation without a rule have a dimension in front: "n", "m" or none."""

    def __init__(self, dimension: str) -> None:
        self.dimension = dimension


def _each(op: Callable[..., Any], places: Any, args: Sequence[Any], kwargs: Mapping[str, Any], n: int, b: int) -> Any:
    """Run an operation once for each record, or each gateway, and put the results side by side.

    Slow, but nothing can couple there; torch.vmap would be faster and is wrong for some operations (index_fill by a value
    of each record fills all records with one of them).
    """
    dimensions = {place.dimension for place in _places(places)}
    number, per = (n, b) if "n" in dimensions else (n // b, 1)

    def own(place: Any, value: Any, record: int) -> Any:
        if isinstance(place, _Place):
            if not place.dimension:
                return value
            # Memory of its own: a kernel that reads beyond it finds no other record.
            one = value[record] if place.dimension == "n" else value[record // per]
            return one.clone(memory_format=torch.contiguous_format)
        if isinstance(place, tuple | list):
            return [own(one, item, record) for one, item in zip(place, value, strict=True)]
        if isinstance(place, dict):
            return {key: own(one, value[key], record) for key, one in place.items()}
        return value

    found = []
    for record in range(number):
        own_args, own_kwargs = own(list(places), [list(args), dict(kwargs)], record)
        found.append(op(*own_args, **own_kwargs))
    if isinstance(found[0], torch.Tensor):
        return torch.stack(found)
    if found[0] is None:  # it only checks something
        return None
    return tuple(None if parts[0] is None else torch.stack(list(parts)) for parts in zip(*found, strict=True))


def _places(places: Any) -> Iterator[_Place]:
    if isinstance(places, _Place):
        yield places
    elif isinstance(places, tuple | list):
        for one in places:
            yield from _places(one)
    elif isinstance(places, dict):
        yield from _places(list(places.values()))
