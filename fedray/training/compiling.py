"""Turns a traced graph into a `Program`: drops operations without effect and computes constants beforehand."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import is_fake

from fedray.training.program import Draw, Instruction, Program, Site, Spec, Untraceable, Value
from fedray.training.refusals import reason_against_state, root_of
from fedray.training.traced_code import TracedCode, attribute_of

IDENTITIES = frozenset(
    {
        "aten.clone.default",
        "aten.detach.default",
        "aten.alias.default",
        "aten.lift_fresh_copy.default",
        "aten.lift_fresh.default",
        "aten.contiguous.default",
    }
)

# Operations that fill a shape: with a number, or with the argument at a position.
_FILLS: dict[str, float | int] = {
    "aten.ones_like.default": 1.0,
    "aten.zeros_like.default": 0.0,
    "aten.new_ones.default": 1.0,
    "aten.new_zeros.default": 0.0,
    # What memory happens to hold could be of other records.
    "aten.empty_like.default": 0.0,
    "aten.new_empty.default": 0.0,
    "aten.new_empty_strided.default": 0.0,
    "aten.empty.memory_format": 0.0,
    "aten.empty_strided.default": 0.0,
    "aten.empty_permuted.default": 0.0,
    "aten.full_like.default": 1,
    "aten.new_full.default": 2,
}

# Operations on memory, not on values.
_OF_MEMORY = ("as_strided", "_reshape_alias", "resize", "_resize", "set", "slice_inverse", "_nested")

_LARGEST_FOLDED = 2**22  # values of a constant that is computed beforehand


@dataclass(frozen=True, kw_only=True)
class JointOutputs:
    """What each output of a joint graph (forward and backward pass in one) is.

    Args:
        raw: Trainable parameters whose gradients come first.
        sites: Kind, parameter, padding and number of uses of each `Site`; all inputs a come next, then all gradients e.
        draws: Random numbers that the forward pass draws.
    """

    raw: list[int]
    sites: list[tuple[str, int, int | None, int]]
    draws: list[Draw]


def compiled(code: TracedCode, joint: fx.GraphModule, wanted: JointOutputs) -> Program:
    """Return a joint graph as a `Program`, without idle operations and with constants computed beforehand."""
    return _Compiler(code, joint, wanted).program()


class _Compiler:
    def __init__(self, code: TracedCode, joint: fx.GraphModule, wanted: JointOutputs) -> None:
        joint.graph.eliminate_dead_code()
        self._joint, self._wanted = joint, wanted
        self._num_params, num_held = len(code.params), len(code.held)
        self._num_draws, self._num_inputs = len(wanted.draws), len(code.inputs)
        nodes = list(joint.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self._constants: dict[fx.Node, Any] = {}  # tensors, or numbers such as buffer.item()
        for node, value in zip(placeholders[self._num_params :], code.held.values(), strict=False):
            self._constants[node] = value
        self._inputs = [*placeholders[: self._num_params], *placeholders[self._num_params + num_held :]]
        self._same: dict[fx.Node, fx.Node] = {}
        self._nodes: list[fx.Node] = []
        for node in nodes:
            self._take(node)
        (self._output,) = (node for node in nodes if node.op == "output")

    def _of(self, node: fx.Node) -> fx.Node:
        return self._same.get(node, node)

    def _take(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            value = attribute_of(self._joint, str(node.target))
            if is_fake(value):
                raise Untraceable(
                    "it holds values that the trace did not see being made, so they cannot be computed again"
                )
            self._constants[node] = value.detach()
            return
        if node.op != "call_function":
            return
        self._refuse(node)
        if _name(node) in IDENTITIES or _is_same_view(node):
            self._same[node] = self._of(node.args[0])  # type: ignore[arg-type]  # its argument is a node
            return
        filled = _filled(node)
        if filled is not None:
            self._constants[node] = filled
            return
        sources = [self._of(source) for source in node.all_input_nodes]
        if all(source in self._constants for source in sources) and _can_fold(node):
            arguments = fx.map_arg((node.args, node.kwargs), lambda source: self._constants[self._of(source)])
            self._constants[node] = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]  # an operator
            return
        self._nodes.append(node)

    def _refuse(self, node: fx.Node) -> None:
        """Refuse operations that could reach beyond the values of their arguments."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return  # the name says what else is refused
        packet = str(target).split(".")[1]
        if target.namespace != "aten":
            raise Untraceable(
                f"it calls the custom operator {target}, whose code may couple records or remember them; write it with torch's "
                "own operations"
            )
        if packet.startswith(_OF_MEMORY):
            raise Untraceable(f"it uses {packet}, which sees the memory of other records; use slices or unfold")
        if target._schema.is_mutable:
            root = self._of(root_of(node.args[0])) if node.args else None
            if root in self._inputs:
                raise Untraceable("its code changes its input or target in place; work on a copy (x.clone())")
            raise Untraceable(reason_against_state(["a tensor that it holds"]))

    def program(self) -> Program:
        """Return the program."""
        used_constants: dict[fx.Node, None] = {}
        outputs = [None if node is None else self._of(node) for node in self._output.args[0]]
        for node in [*self._nodes]:
            for source in node.all_input_nodes:
                if isinstance(self._constants.get(self._of(source)), torch.Tensor):
                    used_constants[self._of(source)] = None
        for output in outputs:
            if output is not None and output in self._constants:
                used_constants[output] = None
        constants = list(used_constants)
        order = [*self._inputs[: self._num_params], *constants, *self._inputs[self._num_params :]]
        index = {node: number for number, node in enumerate(order)}
        specs = {number: _spec(node) or _spec_of(self._constants[node]) for node, number in index.items()}
        instructions = []
        for node in self._nodes:
            index[node] = len(index)
            spec = _spec(node)
            arguments = _plain(
                _complete(node),
                lambda source: (
                    Value(index[source]) if (source := self._of(source)) in index else self._constants[source]
                ),
            )
            instructions.append(
                Instruction(
                    op=_name(node), args=tuple(arguments[0]), kwargs=dict(arguments[1]), out=index[node], spec=spec
                )
            )
            if spec is not None:
                specs[index[node]] = spec
        gradients: list[int | None] = [None] * self._num_params
        raw = len(self._wanted.raw)
        for param, output in zip(self._wanted.raw, outputs[:raw], strict=True):
            gradients[param] = None if output is None else index[output]
        rest = [index[output] for output in outputs[raw:] if output is not None]
        a, e, sites, start = rest[: len(rest) // 2], rest[len(rest) // 2 :], [], 0
        for kind, param, padding, number in self._wanted.sites:
            part = slice(start, start + number)
            sites.append(
                Site(kind=kind, param=param, inputs=tuple(a[part]), gradients=tuple(e[part]), padding=padding)  # type: ignore[arg-type]  # one of three
            )
            start += number
        return Program(
            params=tuple(tuple(_spec(node).shape) for node in self._inputs[: self._num_params]),  # type: ignore[union-attr]  # a tensor
            constants=tuple(self._constants[node].clone(memory_format=torch.contiguous_format) for node in constants),
            draws=tuple(self._wanted.draws),
            num_inputs=self._num_inputs,
            instructions=tuple(instructions),
            gradients=tuple(gradients),
            sites=tuple(sites),
            specs=specs,
        )


def _name(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    raise Untraceable(f"it calls {node.target}, which is no operation on tensors")


def _complete(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """Return a node's arguments with all positional ones by position, defaults included: rules count on their places."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args), dict(node.kwargs)
    positional = [one for one in node.target._schema.arguments if not one.kwarg_only]
    named = dict(node.kwargs)
    args = list(node.args)
    for one in positional[len(args) :]:
        args.append(named.pop(one.name) if one.name in named else one.default_value)
    return args, named


def _is_same_view(node: fx.Node) -> bool:
    """Tell whether a node gives its input back as it is."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or _spec(source) is None or _spec(source) != _spec(node):
        return False
    name = _name(node)
    if name == "aten.permute.default":
        rank = len(_spec(source).shape)  # type: ignore[union-attr]  # it has one, see above
        dims = [int(dim) % rank for dim in node.args[1]]  # type: ignore[arg-type, union-attr]  # whole numbers
        return dims == sorted(dims)
    if name == "aten.sum.dim_IntList":
        return True  # over dimensions of size 1, which are kept
    return name in ("aten.view.default", "aten.expand.default", "aten.reshape.default", "aten._unsafe_view.default")


def _can_fold(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
        raise Untraceable(
            f"it draws random numbers by {target}, which is not supported; use Dropout, torch.rand or torch.randn"
        )
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.numel() <= _LARGEST_FOLDED


def _filled(node: fx.Node) -> torch.Tensor | None:
    """Return the value of a node that takes nothing but a shape from its inputs."""
    value, fill = node.meta.get("val"), _FILLS.get(_name(node))
    large = isinstance(value, torch.Tensor) and value.numel() > _LARGEST_FOLDED and "empty" not in _name(node)
    if fill is None or not isinstance(value, torch.Tensor) or large:
        return None
    number = fill if isinstance(fill, float) else node.args[int(fill)]
    if not isinstance(number, int | float):
        return None
    return torch.full(tuple(map(int, value.shape)), number, dtype=value.dtype)


def _spec(node: fx.Node) -> Spec | None:
    value = node.meta.get("val")
    return _spec_of(value) if isinstance(value, torch.Tensor) else None


def _spec_of(value: torch.Tensor) -> Spec:
    return Spec(shape=tuple(int(size) for size in value.shape), dtype=value.dtype)


def _plain(arguments: Any, new: Callable[[fx.Node], Any]) -> Any:
    """Return arguments as tuples, lists and dicts, with nodes replaced."""
    if isinstance(arguments, fx.Node):
        return new(arguments)
    if isinstance(arguments, tuple | list):
        return [_plain(item, new) for item in arguments]
    if isinstance(arguments, dict):
        return {key: _plain(item, new) for key, item in arguments.items()}
    return arguments
