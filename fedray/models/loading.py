"""Loading a finished run's model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedray.errors import InputError


def load_model(path: str | Path, make_model: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Return the final model of a run, in evaluation mode.

    Args:
        path: The run directory.
        make_model: Builds the architecture that the run trained.

    Raises:
        InputError: There is no finished model, the file is damaged, or the architecture does not fit.
    """
    file = Path(path) / "model.safetensors"
    if not file.exists():
        raise InputError(f"{path} holds no model.safetensors; only a finished run has one.")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is damaged ({error}); restore it or repeat the run.") from error
    model = make_model()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{file} does not fit the model ({error}); build the architecture that the run trained."
        ) from error
    return model.eval()
