"""From the user's model and loss to a `Program`: the code runs once, on one record without values, and what it does is noted.

Records cannot be coupled by what follows: the code saw a single record, and its operations are all that is ever repeated.
Two passes are noted. The first is what the code does before autograd sees it (layers keep their names), so that weights of
matrix products and embeddings, which need no gradient per record, can be told from others, random draws be keyed, and
recurrent layers be taken apart. The second is that pass with autograd's backward pass behind it.

Code whose backward pass is its own (torch.autograd.Function, hooks on gradients), and what else the first pass cannot note,
goes straight to the second pass.
"""

from __future__ import annotations

import operator
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import is_fake
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from fedray.data.inputs import Inputs, leaves, rebuilt
from fedray.models import Loss, call_model
from fedray.training.fusing import fuse
from fedray.training.held_state import changed, held_state
from fedray.training.parameter_uses import Use, uses_of
from fedray.training.program import Draw, Instruction, Program, Site, Spec, Untraceable, Value
from fedray.training.rewriting import Rewriter, draws_of

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


class _OwnBackward(Exception):
    """The code has a backward pass of its own."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """What the trace is made from: shapes and types alone, values are never looked at.

    Args:
        x: One record, with a batch dimension of 1.
        y: Its target, likewise.
    """

    x: Inputs
    y: torch.Tensor


class _Code:
    """The user's model and loss as one function of flat lists of tensors."""

    def __init__(self, model: nn.Module, loss: Loss, example: Example) -> None:
        named = dict(model.named_parameters())
        self.trainable = [name for name, parameter in named.items() if parameter.requires_grad]
        self.params = [named[name].detach() for name in self.trainable]
        frozen = {name: p.detach() for name, p in named.items() if not p.requires_grad}
        self.held = frozen | {name: buffer.detach() for name, buffer in model.named_buffers()}
        self.labels = [f"{'parameter' if name in frozen else 'buffer'} {name}" for name in self.held]
        self._model, self._loss, self._example = model, loss, example
        self.inputs = leaves(example.x)

    def losses(
        self, params: Sequence[torch.Tensor], held: Sequence[torch.Tensor], x: Sequence[torch.Tensor], y: Any
    ) -> torch.Tensor:
        """Return the record's loss `[1]`."""
        state = dict(zip(self.trainable, params, strict=True)) | dict(zip(self.held, held, strict=True))
        output = call_model(self._model, rebuilt(self._example.x, x), state)
        found = self._loss(output, y)
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise Untraceable(f"the loss of one record is {shape}; it must be one value a record, [n] for n records")
        return found.reshape(1)


def trace(model: nn.Module, loss: Loss, example: Example) -> Program:
    """Return what a model and a loss compute for one record, with its gradient.

    Args:
        model: In the mode in which it trains; stays unchanged, but for what its own forward pass changes.
        loss: Maps (output, target) of a batch of one to its value.
        example: Gives shapes and types.

    Raises:
        Untraceable: The code looks at values, has state, or uses what is not supported; says which.
    """
    code = _Code(model, loss, example)
    with _watched(model, loss):
        try:
            try:
                with _own_backward_passes_refused():
                    forward = _forward(code)
                _refuse_writes(forward, code)
                _refuse_unseen(forward)
                fuse(forward)
                joint, wanted = _joint(code, forward, uses_of(forward, len(code.params)))
            except _OwnBackward:
                joint, wanted = _joint_directly(code)
            except Untraceable:
                raise
            except (
                Exception
            ) as error:  # hooks on gradients, gradients of gradients, vmap and others want autograd itself
                try:
                    joint, wanted = _joint_directly(code)
                except Exception:
                    raise error from None
        except Untraceable as error:
            raise Untraceable(str(error).split("\n")[0]) from error  # without where torch.fx was
        except Exception as error:  # the user's code may do anything that torch.fx refuses
            raise Untraceable(_reason(error)) from error
    program = _program(code, joint, wanted)
    if not program.wanted():
        raise Untraceable(
            "its loss does not depend on any trainable parameter, so there is nothing to learn; leave out detach() and no_grad()"
        )
    return program


@contextmanager
def _watched(model: nn.Module, loss: Loss) -> Iterator[None]:
    """Refuse code that changes what it holds while it runs."""
    before = held_state(model, loss)
    with warnings.catch_warnings(), mock.patch.object(torch.autocast, "__enter__", _refuse_autocast):
        warnings.simplefilter("ignore")  # remarks for developers of torch.fx
        yield
    names = changed(before, held_state(model, loss))
    if names:
        raise Untraceable(_stateful(names))


def _refuse_autocast(_: object) -> None:
    raise Untraceable(
        "it enters torch.autocast, which a trace does not see; cast by x.to(torch.bfloat16) where you want it"
    )


def _stateful(names: Sequence[str]) -> str:
    if any("random numbers" in name for name in names):
        return f"its code draws from {names[0]}, which cannot be keyed; draw by torch"
    return (
        f"its code changes {', '.join(names[:3])} while it trains; state would let one record speak in another's pass: keep "
        "none, or set it in the constructor"
    )


def _refuse_writes(graph: fx.GraphModule, code: _Code) -> None:
    """Refuse operations that change parameters, buffers or other tensors that the code holds."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    held = [*(f"parameter {name}" for name in code.trainable), *code.labels]
    names = dict(zip(placeholders, held, strict=False))
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for position, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            root = _root(given)
            if root in names:
                raise Untraceable(_stateful([names[root]]))
            if isinstance(root, fx.Node) and root.op == "get_attr":
                raise Untraceable(_stateful(["a tensor that it holds"]))


def _root(node: Any) -> Any:
    """Return what a view is a view of."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is operator.getitem:
            node = node.args[0]
            continue
        returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
        if not returns or returns[0].alias_info is None:
            break
        node = node.args[0]
    return node


def trace_loss(loss: Loss, output: torch.Tensor, target: torch.Tensor) -> Program:
    """Return how a loss changes with a model's output, for one record: a program whose one parameter is the output.

    Args:
        loss: Maps (output, target) of a batch of one to its value.
        output: `[1, …]`; gives shape and type.
        target: `[1, …]`; likewise.

    Raises:
        Untraceable: See `trace`.
    """

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Parameter(output.detach().clone())

        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return self.output

    code = _Code(Output(), loss, Example(x=torch.zeros(1, 1), y=target))
    with _watched(nn.Identity(), loss):
        try:
            return _program(code, *_joint_directly(code))
        except Untraceable:
            raise
        except Exception as error:  # the user's code may do anything that torch.fx refuses
            raise Untraceable(_reason(error)) from error


def _forward(code: _Code) -> fx.GraphModule:
    """Return the first pass: a graph of (params…, held…, x…, y) to the loss."""
    sizes = [len(code.params), len(code.held), len(code.inputs)]

    def flat(*values: torch.Tensor) -> torch.Tensor:
        params, held, x = _split(values, sizes)
        return code.losses(params, held, x, values[-1])

    arguments = (*code.params, *code.held.values(), *code.inputs, code._example.y)
    graph: fx.GraphModule = make_fx(flat, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(
        *arguments
    )
    return graph


def _refuse_unseen(graph: fx.GraphModule) -> None:
    """Refuse values without a past, such as a gradient that was taken inside of the forward pass."""
    if any(node.op == "get_attr" and is_fake(_attribute(graph, str(node.target))) for node in graph.graph.nodes):
        raise RuntimeError(
            "it holds values that the trace did not see being made (a gradient inside of its forward pass?)"
        )


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What the outputs of a joint graph are.

    Args:
        raw: Trainable parameters whose gradients come first.
        sites: Of each site: its kind, parameter, padding and number of uses; then come all a, then all e.
        draws: What the forward pass draws.
    """

    raw: list[int]
    sites: list[tuple[str, int, int | None, int]]
    draws: list[Draw]


def _joint(code: _Code, forward: fx.GraphModule, uses: dict[int, Use]) -> tuple[fx.GraphModule, _Wanted]:
    """Return the second pass, and what its outputs are."""
    raw = [index for index in range(len(code.params)) if index not in uses]
    draws = draws_of(forward)
    sizes = [len(code.params), len(code.held), len(draws), len(code.inputs)]
    sites: list[tuple[str, int, int | None, int]] = []

    def flat(*values: torch.Tensor) -> list[Any]:
        params, held, drawn, x = _split(values, sizes)
        params = [value.detach().requires_grad_(index not in uses) for index, value in enumerate(params)]
        rewriter = Rewriter(forward, uses, params, drawn)
        total = rewriter.run(*params, *held, *x, values[-1]).sum()
        taps = rewriter.taps
        targets = [*(params[index] for index in raw), *(tap.output for tap in taps)]
        found = _gradients(total, targets)
        gradients, e = found[: len(raw)], found[len(raw) :]
        sites.clear()
        outputs_a: list[Any] = []
        outputs_e: list[Any] = []
        for param, use in uses.items():
            own = [
                (tap.input.detach(), gradient)
                for tap, gradient in zip(taps, e, strict=True)
                if tap.param == param and gradient is not None
            ]
            if own:
                sites.append((use.kind, param, use.padding, len(own)))
                outputs_a += [a for a, _ in own]
                outputs_e += [g for _, g in own]
        return [*gradients, *outputs_a, *outputs_e]

    arguments = (
        *code.params,
        *code.held.values(),
        *(torch.zeros(draw.shape) for draw in draws),
        *code.inputs,
        code._example.y,
    )
    graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    graph = make_fx(functionalize(graph), tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    return graph, _Wanted(raw=raw, sites=sites, draws=draws)


def _joint_directly(code: _Code) -> tuple[fx.GraphModule, _Wanted]:
    """Return the second pass of code with a backward pass of its own: every gradient is made."""
    sizes = [len(code.params), len(code.held), len(code.inputs)]

    def flat(*values: torch.Tensor) -> list[Any]:
        params, held, x = _split(values, sizes)
        params = [value.detach().requires_grad_() for value in params]
        return _gradients(code.losses(params, held, x, values[-1]).sum(), params)

    arguments = (*code.params, *code.held.values(), *code.inputs, code._example.y)
    graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    _refuse_writes(graph, code)
    graph = make_fx(functionalize(graph), tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Untraceable(
                f"it draws random numbers ({node.target}) where autograd's own pass is noted (in a loss, beside an autograd "
                "function, a hook on a gradient or a gradient of gradients); leave one of them out"
            )
    return graph, _Wanted(raw=list(range(len(code.params))), sites=[], draws=[])


def _gradients(total: torch.Tensor, targets: Sequence[torch.Tensor]) -> list[Any]:
    if not total.requires_grad or not targets:
        return [None] * len(targets)
    return list(torch.autograd.grad(total, targets, allow_unused=True))


def _split(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(values[start : start + size]))
        start += size
    return parts


@contextmanager
def _own_backward_passes_refused() -> Iterator[None]:
    """Raise `_OwnBackward` where code applies an autograd function, whose backward pass the first pass would not see."""
    original = torch.autograd.Function.__dict__.get("apply")

    def refuse(*_arguments: Any, **_named: Any) -> Any:
        raise _OwnBackward

    torch.autograd.Function.apply = classmethod(refuse)  # type: ignore[assignment, method-assign]  # put back below
    try:
        yield
    finally:
        if original is None:
            del torch.autograd.Function.apply
        else:
            torch.autograd.Function.apply = original  # type: ignore[method-assign]  # as it was


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, TypeError) and any(frame.filename.endswith("torch/nn/modules/rnn.py") for frame in frames):
        return (
            f"a recurrent layer raised {text!r}; if its sequences are packed, pad them, and take the last step of each"
        )
    looks = ("data-dependent", "DataDependent", "local_scalar_dense", ".item()", "numpy() is not supported", "nonzero")
    if any(word in f"{type(error).__name__} {error}" for word in looks):
        return (
            f"its code looks at the values of a record ({text}); what it computes must not depend on values by Python's own if, "
            ".item() or .numpy(): use torch.where, or hand in what it looks for (an attention mask)"
        )
    return (
        f"its forward and backward pass on a single record raised {type(error).__name__}: {text}; it must accept a batch of one "
        "record, in train mode"
    )


def _program(code: _Code, joint: fx.GraphModule, wanted: _Wanted) -> Program:
    """Turn a joint graph into plain data, without what does nothing, and with constants computed beforehand."""
    return _Compiler(code, joint, wanted).program()


class _Compiler:
    def __init__(self, code: _Code, joint: fx.GraphModule, wanted: _Wanted) -> None:
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
            value = _attribute(self._joint, str(node.target))
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
            root = self._of(_root(node.args[0])) if node.args else None
            if root in self._inputs:
                raise Untraceable("its code changes its input or target in place; work on a copy (x.clone())")
            raise Untraceable(_stateful(["a tensor that it holds"]))

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


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for word in path.split("."):
        found = getattr(found, word)
    return found
