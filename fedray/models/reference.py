"""Reference models, and a user's own by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fedray.config.user_code import call, find_function, is_reference
from fedray.errors import InputError

MAX_CLASSES = 100_000  # a larger label is a mistake (an id, a pixel value), not a class


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
    """Build the model that --model names (the caller seeds torch's generators).

    Args:
        name: mlp, cnn or module:function.
        record_shape: Shape of one record of x; None when x is several inputs.
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
