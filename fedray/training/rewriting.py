"""Runs a traced forward pass again under autograd, with some of its operations replaced.

Replaced are products with weights and embeddings ("tapped": their inputs and outputs are noted, so that no weight's
gradient per record is needed), recurrent layers (by an explicit loop), and what
`fedray.training.replacements` and `fedray.training.keyed_draws` list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fedray.training import recurrence
from fedray.training.parameter_uses import RECURRENT, ParameterUse, is_transposed, weight_place
from fedray.training.program import Draw, Untraceable

ATEN = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One use of a weight whose gradient follows from an input a and an output gradient e.

    Args:
        param: Which trainable parameter.
        input: a.
        output: The value whose gradient is e.
    """

    param: int
    input: torch.Tensor
    output: torch.Tensor


class Rewriter(fx.Interpreter):
    """Runs a forward graph with some of its operators replaced.

    Args:
        forward: Its first placeholders are the trainable parameters.
        uses: The parameters to tap, see `uses_of`.
        params: Trainable parameters; those that are tapped need no gradient.
        drawn: Random numbers in the order in which they are taken; None to find out what is drawn.
        rules: The function that replaces each operator; gets the rewriter and the operator's arguments.
    """

    def __init__(
        self,
        forward: fx.GraphModule,
        uses: Mapping[int, ParameterUse],
        params: Sequence[torch.Tensor],
        drawn: Sequence[torch.Tensor] | None,
        rules: Mapping[Any, Callable[..., Any]],
    ) -> None:
        super().__init__(forward, garbage_collect_values=False)
        self.taps: list[Tap] = []
        self.draws: list[Draw] = []
        self._uses = uses
        self._rules = rules
        self._drawn = drawn
        placeholders = [node for node in forward.graph.nodes if node.op == "placeholder"]
        self._tapped = {node: index for index, node in enumerate(placeholders[: len(params)]) if index in uses}
        for node in forward.graph.nodes:  # a weight that is transposed is the same weight
            if node.op == "call_function" and is_transposed(node) and node.args[0] in self._tapped:
                self._tapped[node] = self._tapped[node.args[0]]

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, or what takes its place."""
        if n.op != "call_function":
            return super().run_node(n)
        arguments, named = self.fetch_args_kwargs_from_env(n)
        rule = self._rules.get(n.target)
        if n.target in RECURRENT:
            return self._recurrent(n, arguments)
        if rule is not None:
            return rule(self, *arguments, **named)
        if isinstance(n.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in n.target.tags:
            raise Untraceable(
                f"{n.target} draws random numbers in a way that cannot be keyed; use Dropout, torch.rand or torch.randn"
            )
        place = weight_place(n)
        weight = None if place is None else self._tapped.get(n.args[place[0]])
        if place is None or weight is None:
            return n.target(*arguments, **named)  # type: ignore[operator]  # an operator
        a = arguments[1 - place[0]] if n.target is not ATEN.addmm.default else arguments[1]
        return self.tap(weight, a, n.target(*arguments, **named))  # type: ignore[operator]  # an operator

    def tap(self, param: int, a: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Note one use of a weight; return its output for what follows."""
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output.requires_grad_()
        self.taps.append(Tap(param=param, input=a, output=output))
        return output.clone()  # what follows may work in place; the trace drops the copy

    def draw(self, law: Any, shape: Sequence[int]) -> torch.Tensor:
        """Return the next random numbers."""
        self.draws.append(Draw(law=law, shape=tuple(int(size) for size in shape)))
        if self._drawn is None:
            return torch.zeros(list(shape))
        return self._drawn[len(self.draws) - 1]

    def dropout(self, x: torch.Tensor, rate: float, train: bool, shape: Sequence[int] | None = None) -> torch.Tensor:
        """Return x with values dropped at `rate`, others scaled up (Srivastava et al. 2014)."""
        if not train or rate == 0:
            return x
        if rate == 1:
            return x * 0.0
        keep = self.draw("uniform", x.shape if shape is None else shape) >= rate
        return x * (keep.to(x.dtype) * (1.0 / (1.0 - rate)))

    def _recurrent(self, node: fx.Node, arguments: Sequence[Any]) -> Any:
        weights = [self._tapped.get(one) for one in node.args[2]]  # type: ignore[union-attr]  # a list of nodes
        return recurrence.run(RECURRENT[node.target], arguments, weights, self.tap, self.dropout)  # type: ignore[index]  # checked by the caller


def draws_of(forward: fx.GraphModule, rules: Mapping[Any, Callable[..., Any]]) -> list[Draw]:
    """Return what a forward graph draws, in order."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values = [node.meta["val"] for node in forward.graph.nodes if node.op == "placeholder"]
    with mode:
        values = [torch.empty(value.shape, dtype=value.dtype) for value in values]
        rewriter = Rewriter(forward, {}, [], None, rules)
        rewriter.run(*values)
    return rewriter.draws
