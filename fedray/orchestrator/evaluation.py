"""Loss and metrics of parameters on public held-out data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedray.data.inputs import Inputs, on, taken
from fedray.models.calls import call_model
from fedray.models.layout import Layout
from fedray.tasks.task import Task

_MOST_TOGETHER = 4096  # records in one forward pass
_LARGEST_OUTPUT_BYTES = 64 * 2**20  # of one forward pass: a language model scores its vocabulary at every token


@dataclass(frozen=True, kw_only=True)
class Score:
    """Mean loss and the task's metrics by name; None where there is nothing to measure, or no number came out."""

    loss: float | None
    metrics: Mapping[str, float | None]


class Evaluation:
    """Scores parameters on held-out data in a model of its own.

    Args:
        model: Copied, in evaluation mode.
        test: `(x, y)`, or None.
        task: Gives loss and metrics.
        device: Where.
    """

    def __init__(
        self, model: torch.nn.Module, test: tuple[Inputs, torch.Tensor] | None, task: Task, device: torch.device
    ) -> None:
        self._model = copy.deepcopy(model).to(device).eval()
        self._layout = Layout.of(self._model)
        self._test = None if test is None else (on(test[0], device), test[1].to(device))
        self._task = task
        self._together: int | None = None

    @torch.no_grad()
    def score(self, params: npt.NDArray[np.float32]) -> Score:
        """Return the score of `params` `[P]`; what diverged is None (JSON has no infinity)."""
        names = [metric.name for metric in self._task.metrics]
        if self._test is None:
            return Score(loss=None, metrics=dict.fromkeys(names))
        self._layout.load(self._model, params)
        x, y = self._test
        total, states = 0.0, dict[str, torch.Tensor]()
        together = self._records_together(x)
        for start in range(0, len(y), together):
            output = call_model(self._model, taken(x, slice(start, start + together)))
            target = y[start : start + together]
            total += float(self._task.losses(output, target).double().sum())
            for metric in self._task.metrics:
                state = metric.state(output, target).double()
                states[metric.name] = states[metric.name] + state if metric.name in states else state
        values = {metric.name: metric.value(states[metric.name], len(y)) for metric in self._task.metrics}
        return Score(loss=_finite(total / len(y)), metrics={name: _finite(value) for name, value in values.items()})

    def _records_together(self, x: Inputs) -> int:
        if self._together is None:
            output = call_model(self._model, taken(x, slice(1)))
            fitting = _LARGEST_OUTPUT_BYTES // max(1, output.numel() * output.element_size())
            self._together = max(1, min(_MOST_TOGETHER, fitting))
        return self._together


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
