"""Traces the user's model and loss into a `Program`: runs them once, on one record without values, noting what they do.

Nothing after this can couple records: the code saw a single record, and only its operations are ever repeated.
Two passes are noted. The first is what the code does before autograd sees it (layers keep their names), so that weights of
matrix products and embeddings, which need no gradient per record, can be told from others, random draws be keyed, and
recurrent layers be taken apart. The second is that pass with autograd's backward pass behind it.

Code whose backward pass is its own (torch.autograd.Function, hooks on gradients), and what else the first pass cannot note,
goes straight to the second pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from fedray.tasks.own_loss import Loss
from fedray.training.compiling import JointOutputs, compiled
from fedray.training.fusing import fuse
from fedray.training.parameter_uses import ParameterUse, uses_of
from fedray.training.program import Program, Untraceable
from fedray.training.refusals import reason_of, refuse_state_changes, refuse_unseen, refuse_writes
from fedray.training.replacements import REPLACEMENTS
from fedray.training.rewriting import Rewriter, draws_of
from fedray.training.traced_code import Example, TracedCode


class _OwnBackward(Exception):
    """The code has a backward pass of its own."""


def trace(model: nn.Module, loss: Loss, example: Example) -> Program:
    """Return the program by which a model and a loss compute one record's loss and gradient.

    Args:
        model: In the mode in which it trains; stays unchanged, but for what its own forward pass changes.
        loss: Maps (output, target) of a batch of one to its value.
        example: Gives shapes and types.

    Raises:
        Untraceable: The code looks at values, has state, or uses what is not supported; says which.
    """
    code = TracedCode(model, loss, example)
    with refuse_state_changes(model, loss):
        try:
            try:
                with _own_backward_passes_refused():
                    forward = _forward(code)
                refuse_writes(forward, code)
                refuse_unseen(forward)
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
            raise Untraceable(reason_of(error)) from error
    program = compiled(code, joint, wanted)
    if not program.wanted():
        raise Untraceable(
            "its loss does not depend on any trainable parameter, so there is nothing to learn; leave out detach() and no_grad()"
        )
    return program


def trace_loss(loss: Loss, output: torch.Tensor, target: torch.Tensor) -> Program:
    """Return the program of a loss and its gradient at the model's output, its one parameter, for one record.

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

    code = TracedCode(Output(), loss, Example(x=torch.zeros(1, 1), y=target))
    with refuse_state_changes(nn.Identity(), loss):
        try:
            return compiled(code, *_joint_directly(code))
        except Untraceable:
            raise
        except Exception as error:  # the user's code may do anything that torch.fx refuses
            raise Untraceable(reason_of(error)) from error


def _forward(code: TracedCode) -> fx.GraphModule:
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


def _joint(
    code: TracedCode, forward: fx.GraphModule, uses: dict[int, ParameterUse]
) -> tuple[fx.GraphModule, JointOutputs]:
    """Return the second pass and the meaning of its outputs."""
    raw = [index for index in range(len(code.params)) if index not in uses]
    draws = draws_of(forward, REPLACEMENTS)
    sizes = [len(code.params), len(code.held), len(draws), len(code.inputs)]
    sites: list[tuple[str, int, int | None, int]] = []

    def flat(*values: torch.Tensor) -> list[Any]:
        params, held, drawn, x = _split(values, sizes)
        params = [value.detach().requires_grad_(index not in uses) for index, value in enumerate(params)]
        rewriter = Rewriter(forward, uses, params, drawn, REPLACEMENTS)
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
    return graph, JointOutputs(raw=raw, sites=sites, draws=draws)


def _joint_directly(code: TracedCode) -> tuple[fx.GraphModule, JointOutputs]:
    """Return the second pass of code with a backward pass of its own: every gradient is made."""
    sizes = [len(code.params), len(code.held), len(code.inputs)]

    def flat(*values: torch.Tensor) -> list[Any]:
        params, held, x = _split(values, sizes)
        params = [value.detach().requires_grad_() for value in params]
        return _gradients(code.losses(params, held, x, values[-1]).sum(), params)

    arguments = (*code.params, *code.held.values(), *code.inputs, code._example.y)
    graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    refuse_writes(graph, code)
    graph = make_fx(functionalize(graph), tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Untraceable(
                f"it draws random numbers ({node.target}) where autograd's own pass is noted (in a loss, beside an autograd "
                "function, a hook on a gradient or a gradient of gradients); leave one of them out"
            )
    return graph, JointOutputs(raw=list(range(len(code.params))), sites=[], draws=[])


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
