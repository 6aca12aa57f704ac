"""What a model must pass before it may train privately."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedray.data.inputs import Inputs, leaves, rebuilt, taken
from fedray.data.inputs import joined as joined_inputs
from fedray.errors import InputError
from fedray.models.calls import call_model
from fedray.models.layout import Layout
from fedray.tasks.classification import Classification
from fedray.tasks.own_loss import Loss
from fedray.tasks.task import Task


def fix(model: nn.Module) -> nn.Module:
    """Replace what Opacus' ModuleValidator can replace (BatchNorm by GroupNorm, LSTM by DPLSTM, …)."""
    from opacus.validators import ModuleValidator  # slow import, needed here alone

    if isinstance(model, nn.BatchNorm1d):
        return _group_norm(model.num_features)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, name, _group_norm(child.num_features))
    try:
        return ModuleValidator.fix(model)  # type: ignore[no-any-return]  # opacus is untyped
    except Exception as error:  # opacus raises many kinds for layers that it cannot replace
        raise InputError(
            f"--fix-model: Opacus cannot replace a layer of this model ({error}); replace it yourself."
        ) from error


def _group_norm(num_features: int) -> nn.GroupNorm:
    """Return what replaces a BatchNorm1d; Opacus would make groups of one feature, each of which normalises to zero."""
    groups = max(
        number for number in range(1, 33) if number == 1 or (num_features % number == 0 and num_features >= 4 * number)
    )
    return nn.GroupNorm(groups, num_features)


def check(model: nn.Module, x: Inputs, y: torch.Tensor, task: Task) -> tuple[int, ...]:
    """Check that a model fits the data, and look for what cannot train privately.

    Coupled records are looked for on three records at the initial parameters. That spares users the usual mistakes; it
    proves nothing: the engine keeps records apart, whatever passes here.

    Args:
        model: Stays unchanged.
        x: A few records (n ≥ 1), each tensor `[n, …]`; see `call_model`.
        y: `[n, …]`, their targets.
        task: What is learned.

    Returns:
        The shape of a record's output.

    Raises:
        InputError: Records are coupled, buffers change in a forward pass, the forward fails, or outputs do not fit.
    """
    Layout.of(model)
    model = _copy(model).train()
    _refuse_coupling_types(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = _three_records(x)
    y = y[:3] if len(y) >= 3 else torch.cat([y, y, y])[:3]
    try:
        together, outputs = _leaf_outputs(model, x)
        again, _ = _leaf_outputs(model, x)
        if any(not torch.equal(one, other) for (_, one), (_, other) in zip(together, again, strict=False)):
            model.eval()  # it draws (functional dropout): without its draws, what is left is coupling
            together, _ = _leaf_outputs(model, x)
        alone = [_leaf_outputs(model, taken(x, slice(record, record + 1)))[0] for record in range(3)]
    except (Exception, SystemExit) as error:  # the user's forward may raise anything
        raise InputError(
            f"--model: the forward pass on records of shape {_shape_of(x)} raised {type(error).__name__}: {error}; "
            f"the model must accept a batch of the data's records{_how_called(x)}."
        ) from error
    _refuse_changed_buffers(model, before)
    for record, single in enumerate(alone):
        _refuse_coupled_outputs(together, single, record)
    task.check_outputs(outputs, y)
    _check_metrics(outputs, y, task)
    if not isinstance(task, Classification):
        _check_losses(outputs, y, task.losses)
    return tuple(outputs.shape[1:])


def _three_records(x: Inputs) -> Inputs:
    """Return three records that are not all equal where one holds a float: equal ones would hide a coupling by a mean."""
    x = taken(joined_inputs([x, x, x]), slice(3)) if len(leaves(x)[0]) < 3 else taken(x, slice(3))
    if not any(all(torch.equal(leaf[0], leaf[other]) for leaf in leaves(x)) for other in (1, 2)):
        return x
    moved = [leaf + 0.1 * torch.randn(leaf.shape) if leaf.is_floating_point() else leaf for leaf in leaves(x)]
    return rebuilt(x, moved)  # type: ignore[no-any-return]  # in the structure of x


def _shape_of(x: Inputs) -> str:
    shapes = rebuilt(x, [tuple(leaf.shape[1:]) for leaf in leaves(x)])
    return str(shapes)


def _how_called(x: Inputs) -> str:
    """Return the remedy that a failed forward pass calls for, in brackets."""
    if isinstance(x, dict):
        return f" (x is a dict, so it is called with the arguments {', '.join(x)})"
    if isinstance(x, tuple):
        return f" (x is a tuple, so it is called with {len(x)} argument{'s' * (len(x) > 1)})"
    return "" if x.is_floating_point() else " (x holds whole numbers: unless the model embeds tokens, make it float32)"


def _refuse_changed_buffers(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name not in before or not torch.equal(before[name], buffer):
            raise InputError(
                f"--model: buffer {name} changes during a forward pass; buffers do not travel and are not private: "
                "remove it, or try --fix-model."
            )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever hangs on the model may refuse
        raise InputError(
            f"--model: the model cannot be copied ({type(error).__name__}: {error}); keep nothing on it but layers, "
            "parameters and plain values."
        ) from error


def _refuse_coupling_types(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"--model: {name or 'the model'} is {type(module).__name__}, which couples the records of a batch and keeps "
                "their statistics; use GroupNorm or LayerNorm, or --fix-model to have it replaced."
            )


def _leaf_outputs(model: nn.Module, x: Inputs) -> tuple[list[tuple[str, torch.Tensor]], torch.Tensor]:
    seen: list[tuple[str, torch.Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                seen.append((name, output.detach()))

        return hook

    draws = [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    for module in draws:
        module.eval()  # other draws for other batch sizes are no coupling
    handles = [
        module.register_forward_hook(note(f"{name or 'the model'} ({type(module).__name__})"))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        with torch.no_grad():
            output = call_model(model, x)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"it returned {type(output).__name__}, not a tensor or an object whose .logits is one")
    seen.append((type(model).__name__, output.detach()))
    return seen, output


def _refuse_coupled_outputs(
    together: list[tuple[str, torch.Tensor]], alone: list[tuple[str, torch.Tensor]], record: int
) -> None:
    for (name, batch), (_, single) in zip(together, alone, strict=False):
        if batch.dim() == 0 or len(batch) != 3 or len(single) != 1:
            continue  # not a per-record value (positions, masks)
        if not torch.allclose(batch[record : record + 1], single, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise InputError(
                f"--model: the output of {name} for a record depends on the other records of its batch; per-record privacy "
                "needs independent records: replace it, or try --fix-model."
            )


def _check_metrics(outputs: torch.Tensor, y: torch.Tensor, task: Task) -> None:
    """Try the task's metrics now rather than after the first round."""
    try:
        for metric in task.metrics:
            value = metric.value(metric.state(outputs, y).double(), len(y))
            if not isinstance(metric.name, str) or not isinstance(value, int | float):
                raise TypeError(f"{metric.name!r} gave {type(value).__name__}; a metric has a name and gives a number")
    except (Exception, SystemExit) as error:  # the user's metrics may raise anything
        raise InputError(
            f"--task: its metrics raised {type(error).__name__} on a few records: {error}; see fedray.tasks.task.Metric."
        ) from error


def _check_losses(outputs: torch.Tensor, y: torch.Tensor, loss: Loss) -> None:
    try:
        values = loss(outputs, y)
    except (Exception, SystemExit) as error:  # the user's loss may raise anything
        raise InputError(
            f"loss raised {type(error).__name__}: {error}; it must map (output, target) to [n]."
        ) from error
    if not isinstance(values, torch.Tensor) or values.shape != (len(y),) or not values.is_floating_point():
        shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise InputError(f"loss returned {shape} for {len(y)} records; it must return one value a record.")
    alone = torch.cat([loss(outputs[i : i + 1], y[i : i + 1]) for i in range(len(y))])
    if not torch.allclose(values, alone, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise InputError(
            "loss of a record depends on the other records of its batch; per-record privacy needs independent records: "
            "return a loss that looks at one record at a time."
        )
