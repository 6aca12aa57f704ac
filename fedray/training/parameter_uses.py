"""Finds parameters that only matrix products or embeddings use: their per-record gradients need not be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import fx

Kind = Literal["matrix", "transposed", "rows"]
_A = torch.ops.aten
_TURNS = {_A.t.default, _A.numpy_T.default, _A.mT.default, _A.transpose.int, _A.permute.default}
# Where a node holds weights: operator -> (position, orientation of the gradient, or None for what is never a matrix).
_PLACES: dict[object, tuple[int, Kind]] = {
    _A.linear.default: (1, "matrix"),
    _A.addmm.default: (2, "transposed"),
    _A.mm.default: (1, "transposed"),
    _A.matmul.default: (1, "transposed"),
    _A.embedding.default: (0, "rows"),
}
RECURRENT = {
    _A.lstm.input: "lstm",
    _A.gru.input: "gru",
    _A.rnn_tanh.input: "tanh",
    _A.rnn_relu.input: "relu",
}


@dataclass(frozen=True, kw_only=True)
class ParameterUse:
    """How a parameter's gradient follows from its uses; see `fedray.training.program.Site`.

    Args:
        kind: See there.
        padding: See there.
    """

    kind: Kind
    padding: int | None = None


def is_transposed(node: fx.Node) -> bool:
    """Tell whether a node is its two-dimensional input, transposed."""
    value = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    if node.target not in _TURNS or not isinstance(value, torch.Tensor) or value.dim() != 2:
        return False
    if node.target is _A.transpose.int:
        return {int(dim) % 2 for dim in node.args[1:3]} == {0, 1}  # type: ignore[arg-type]  # whole numbers
    if node.target is _A.permute.default:
        return [int(dim) % 2 for dim in node.args[1]] == [1, 0]  # type: ignore[arg-type, union-attr]  # whole numbers
    return True


def transposed_kind(kind: Kind) -> Kind:
    """Return the kind of a weight that is used transposed."""
    return "transposed" if kind == "matrix" else "matrix"


def weight_place(node: fx.Node) -> tuple[int, Kind] | None:
    """Return where a node's arguments hold a weight, and how its gradient lies; None when they hold none."""
    place = _PLACES.get(node.target)
    if place is None:
        return None
    weight = node.args[place[0]]
    value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 2:
        return None
    if node.target is _A.addmm.default and (node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1):
        return None
    if node.target is _A.embedding.default and any(node.args[3:]):  # by frequency, sparse
        return None
    return place


def uses_of(forward: fx.GraphModule, num_params: int) -> dict[int, ParameterUse]:
    """Return the parameters all of whose uses are of one kind, by index.

    Args:
        forward: Graph whose first placeholders are the trainable parameters.
        num_params: How many of them there are.
    """
    nodes = list(forward.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"][:num_params]
    found: dict[int, set[ParameterUse] | None] = {index: set() for index in range(num_params)}
    holders: dict[fx.Node, tuple[int, bool]] = {node: (index, False) for index, node in enumerate(placeholders)}
    for node in nodes:
        if node.op != "call_function":
            for source in node.all_input_nodes:
                if source in holders:
                    found[holders[source][0]] = None
            continue
        if is_transposed(node) and node.args[0] in holders:
            index, before = holders[node.args[0]]
            holders[node] = (index, not before)
            continue
        for index, use in _uses_in(node, holders):
            known = found[index]
            if use is None or known is None:
                found[index] = None
            else:
                known.add(use)
    return {index: next(iter(uses)) for index, uses in found.items() if uses is not None and len(uses) == 1}


def _uses_in(node: fx.Node, holders: dict[fx.Node, tuple[int, bool]]) -> list[tuple[int, ParameterUse | None]]:
    """Return each parameter that a node takes and how; None for a use that needs the gradient itself."""
    found: list[tuple[int, ParameterUse | None]] = []
    place = weight_place(node)
    recurrent = node.target in RECURRENT
    weights = _recurrent_weights(node) if recurrent else []
    for source in node.all_input_nodes:
        if source not in holders:
            continue
        index, is_turned = holders[source]
        use: ParameterUse | None = None
        if place is not None and node.args[place[0]] is source and _count(node, source) == 1:
            if place[1] != "rows":
                use = ParameterUse(kind=transposed_kind(place[1]) if is_turned else place[1])
            elif not is_turned:
                use = ParameterUse(kind="rows", padding=_padding(node))
        elif recurrent and source in weights and not is_turned:
            use = ParameterUse(kind="matrix")
        found.append((index, use))
    return found


def _count(node: fx.Node, source: fx.Node) -> int:
    return sum(argument is source for argument in node.args)


def _padding(node: fx.Node) -> int | None:
    index = node.args[2] if len(node.args) > 2 else -1
    return int(index) if isinstance(index, int) and index >= 0 else None


def _recurrent_weights(node: fx.Node) -> list[fx.Node]:
    """Return the weights of a recurrent layer that multiply inputs or states (not those of biases)."""
    weights = cast(list[fx.Node], node.args[2])
    return [one for one in weights if one.meta["val"].dim() == 2]
