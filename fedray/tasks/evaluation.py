"""Accuracy and loss of parameters on public held-out data."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedray.data.inputs import Inputs, on, taken
from fedray.models.calls import Loss, call_model
from fedray.models.layout import Layout

_MOST_TOGETHER = 4096  # records in one forward pass
_LARGEST_OUTPUT_BYTES = 64 * 2**20  # of one forward pass: a language model scores its vocabulary at every token


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy in [0, 1] and mean loss; None where there is nothing to measure."""

    accuracy: float | None
    loss: float | None


class Evaluation:
    """Scores parameters on held-out data in a model of its own.

    Args:
        model: Copied, in evaluation mode.
        test: `(x, y)`, or None.
        loss: Maps (output, target) to one value a record.
        class_labels: Whether accuracy has a meaning.
        device: Where.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        test: tuple[Inputs, torch.Tensor] | None,
        loss: Loss,
        class_labels: bool,
        device: torch.device,
    ) -> None:
        self._model = copy.deepcopy(model).to(device).eval()
        self._layout = Layout.of(self._model)
        self._test = None if test is None else (on(test[0], device), test[1].to(device))
        self._loss = loss
        self._class_labels = class_labels
        self._together: int | None = None

    @torch.no_grad()
    def score(self, params: npt.NDArray[np.float32]) -> Score:
        """Return accuracy and loss of `params` `[P]`; a diverged model's loss is None (JSON has no infinity)."""
        if self._test is None:
            return Score(accuracy=None, loss=None)
        self._layout.load(self._model, params)
        x, y = self._test
        total, correct = 0.0, 0
        together = self._records_together(x)
        for start in range(0, len(y), together):
            output = call_model(self._model, taken(x, slice(start, start + together)))
            target = y[start : start + together]
            total += float(self._loss(output, target).double().sum())
            correct += int((output.argmax(dim=-1) == target).sum()) if self._class_labels else 0
        loss = total / len(y)
        return Score(
            accuracy=correct / len(y) if self._class_labels else None, loss=loss if np.isfinite(loss) else None
        )

    def _records_together(self, x: Inputs) -> int:
        if self._together is None:
            output = call_model(self._model, taken(x, slice(1)))
            fitting = _LARGEST_OUTPUT_BYTES // max(1, output.numel() * output.element_size())
            self._together = max(1, min(_MOST_TOGETHER, fitting))
        return self._together
