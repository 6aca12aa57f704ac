"""Refuses user code that cannot be traced faithfully, with a sentence that says why."""

from __future__ import annotations

import operator
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import is_fake

from fedray.tasks.own_loss import Loss
from fedray.training.held_state import changed, held_state
from fedray.training.program import Untraceable
from fedray.training.traced_code import TracedCode, attribute_of


@contextmanager
def refuse_state_changes(model: nn.Module, loss: Loss) -> Iterator[None]:
    """Refuse a model or loss that changes its own state while it runs inside the block."""
    before = held_state(model, loss)
    with warnings.catch_warnings(), mock.patch.object(torch.autocast, "__enter__", _refuse_autocast):
        warnings.simplefilter("ignore")  # remarks for developers of torch.fx
        yield
    names = changed(before, held_state(model, loss))
    if names:
        raise Untraceable(reason_against_state(names))


def _refuse_autocast(_: object) -> None:
    raise Untraceable(
        "it enters torch.autocast, which a trace does not see; cast by x.to(torch.bfloat16) where you want it"
    )


def reason_against_state(names: Sequence[str]) -> str:
    """Return the reason against code that changes what is held under these names."""
    if any("random numbers" in name for name in names):
        return f"its code draws from {names[0]}, which cannot be keyed; draw by torch"
    return (
        f"its code changes {', '.join(names[:3])} while it trains; state would let one record speak in another's pass: keep "
        "none, or set it in the constructor"
    )


def refuse_writes(graph: fx.GraphModule, code: TracedCode) -> None:
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
            root = root_of(given)
            if root in names:
                raise Untraceable(reason_against_state([names[root]]))
            if isinstance(root, fx.Node) and root.op == "get_attr":
                raise Untraceable(reason_against_state(["a tensor that it holds"]))


def root_of(node: Any) -> Any:
    """Return the node that a view shows, through any number of views."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is operator.getitem:
            node = node.args[0]
            continue
        returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
        if not returns or returns[0].alias_info is None:
            break
        node = node.args[0]
    return node


def refuse_unseen(graph: fx.GraphModule) -> None:
    """Refuse values whose origin the trace did not see, such as a gradient taken inside of the forward pass."""
    if any(node.op == "get_attr" and is_fake(attribute_of(graph, str(node.target))) for node in graph.graph.nodes):
        raise RuntimeError(
            "it holds values that the trace did not see being made (a gradient inside of its forward pass?)"
        )


def reason_of(error: Exception) -> str:
    """Return why a trace failed, in words for the model's author."""
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
