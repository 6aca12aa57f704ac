"""Reference models, a user's own, and the checks that a model must pass before it may train privately."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fedray.data.inputs import Inputs, leaves, rebuilt, taken
from fedray.data.inputs import joined as joined_inputs
from fedray.errors import InputError
from fedray.params import Layout
from fedray.user_code import call, find_function, is_reference

MAX_CLASSES = 100_000  # a larger label is a mistake (an id, a pixel value), not a class
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def call_model(model: nn.Module, x: Inputs, state: dict[str, torch.Tensor] | None = None) -> Any:
    """Run a model on x: a tensor, a tuple of arguments or a dict of named ones; an output with `.logits` gives these.

    Args:
        model: Called as `model(x)`, `model(*x)` or `model(**x)`.
        x: See above.
        state: Parameters and buffers by name, in place of the model's own; None for its own.
    """
    arguments = (x,) if isinstance(x, torch.Tensor) else () if isinstance(x, dict) else x
    named = x if isinstance(x, dict) else {}
    if state is None:
        output = model(*arguments, **named)
    else:
        output = functional_call(model, _by_place(model, state), arguments, named, tie_weights=False)
    if not isinstance(output, torch.Tensor) and isinstance(getattr(output, "logits", None), torch.Tensor):
        return output.logits
    return output


def _by_place(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state by one name for each place that holds a tensor.

    functional_call by itself takes a module that is used twice for two, and puts back what it put in.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    values = {id(tensor): state[name] for name, tensor in tensors.items() if name in state}
    found = {}
    for path, module in model.named_modules():  # each once
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None and id(tensor) in values:
                found[f"{path}.{name}" if path else name] = values[id(tensor)]
    return found


def mlp(record_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a perceptron with one hidden layer of 32 units."""
    num_features = 1
    for size in record_shape:
        num_features *= size
    return nn.Sequential(nn.Flatten(), nn.Linear(num_features, 32), nn.ReLU(), nn.Linear(32, num_classes))


def cnn(record_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a small convolutional network with group normalisation, for images `[channels, height, width]`.

    Raises:
        InputError: The records are no images of at least 4×4 pixels.
    """
    if len(record_shape) != 3 or min(record_shape[1:]) < 4:
        raise InputError(
            f"--model cnn needs images of shape (channels, height, width) of at least 4×4, the data has {record_shape}; "
            "use --model mlp or your own."
        )
    channels, height, width = record_shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), num_classes),
    )


def build(name: str, record_shape: tuple[int, ...] | None, num_classes: int) -> nn.Module:
    """Build --model (under the caller's seeded generators).

    Args:
        name: mlp, cnn or module:function.
        record_shape: Of one record of x; None when x is several inputs.
        num_classes: 1 + the largest label.

    Raises:
        InputError: Unknown name, or the user's function fails or returns no module; or a label is no class index, or the
            model takes one input and x is several.
    """
    if name in ("mlp", "cnn") and num_classes > MAX_CLASSES:
        raise InputError(
            f"--model {name}: label {num_classes - 1} is out of range; labels must be class indices below {MAX_CLASSES}."
        )
    if name in ("mlp", "cnn") and record_shape is None:
        raise InputError(
            f"--model is {name} but x is several inputs; it takes one array: give that, or a model of your own."
        )
    if name == "mlp" and record_shape is not None:
        return mlp(record_shape, num_classes)
    if name == "cnn" and record_shape is not None:
        return cnn(record_shape, num_classes)
    if not is_reference(name):
        raise InputError(f"--model is {name!r}; it must be mlp, cnn or module:function.")
    return from_function(find_function(name, "--model"), name)


def from_function(function: Callable[[], Any], name: str) -> nn.Module:
    """Call a user's model function and check what it returns.

    Raises:
        InputError: It raised, or returned no torch module.
    """
    model = call(function, name, "--model")
    if not isinstance(model, nn.Module):
        raise InputError(f"--model {name} returned {type(model).__name__}; it must return a torch.nn.Module.")
    for parameter_name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(
                f"--model {name}: parameter {parameter_name} has no shape yet; use layers with all sizes given, no lazy ones."
            )
    return model


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each record, `[n]`, from scores `[n, K]` and class indices `[n]`."""
    return nn.functional.cross_entropy(output, target, reduction="none")


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


def check(model: nn.Module, x: Inputs, y: torch.Tensor, loss: Loss | None) -> int | None:
    """Check that a model fits the data, and look for what cannot train privately.

    Coupled records are looked for on three records at the initial parameters. That spares users the usual mistakes; it
    proves nothing: the engine keeps records apart, whatever passes here.

    Args:
        model: Stays unchanged.
        x: A few records (n ≥ 1), each tensor `[n, …]`; see `call_model`.
        y: `[n]` or, with a loss, `[n, …]`: their targets.
        loss: The user's loss; None for cross-entropy.

    Returns:
        The number of outputs, or None when the user brought a loss.

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
    return _check_outputs(outputs, y, loss)


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


def _check_outputs(outputs: torch.Tensor, y: torch.Tensor, loss: Loss | None) -> int | None:
    if loss is not None:
        if outputs.shape[:1] != (len(y),):
            raise InputError(
                f"--model: outputs have shape {tuple(outputs.shape)} for {len(y)} records; their first dimension must be the "
                "batch: keep it first."
            )
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
        return None
    if outputs.dim() != 2 or len(outputs) != len(y) or not outputs.is_floating_point():
        raise InputError(
            f"--model: outputs have shape {tuple(outputs.shape)} for {len(y)} records; they must be scores "
            "[records, classes] in float32."
        )
    return int(outputs.shape[1])
