"""Local training of one gateway after the other with Opacus' per-sample clipping and noise.

As in `plain_client`, one model serves all gateways: GradSampleModule (hooks) and DPOptimizer are built once, which
spares the slowest part of what `PrivacyEngine.make_private` would do a gateway and round.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from plain_client import load
from torch.nn.functional import cross_entropy
from workload import Selection, Workload

# torch's word on the hooks of a first layer, whose input needs no gradient: right, and of no consequence here.
warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)


class OpacusClient:
    """A persistent GradSampleModule and DPOptimizer; `train` runs one gateway's round in place."""

    def __init__(self, workload: Workload) -> None:
        self.model = workload.build_model()
        self.parameters = list(self.model.parameters())
        # The summed loss is right for empty batches too; DPOptimizer's "mean" divides by the public batch size.
        self._private = GradSampleModule(self.model, loss_reduction="sum")
        self._adam = workload.build_optimizer(self.parameters)
        self._workload = workload
        self._optimizer: DPOptimizer | None = None

    def train(
        self, received: Sequence[torch.Tensor], x: torch.Tensor, y: torch.Tensor, selections: Iterable[Selection]
    ) -> None:
        """Train from the received parameters over the selected records; the result is in `parameters`."""
        load(self.parameters, received, self._adam)
        optimizer = self._dp_optimizer(len(x))
        for selection in selections:
            cross_entropy(self._private(x[selection]), y[selection], reduction="sum").backward()
            optimizer.step()
            # Frees the per-sample gradients, which the next forward would otherwise add to.
            optimizer.zero_grad()

    def _dp_optimizer(self, num_records: int) -> DPOptimizer:
        if self._optimizer is None:
            self._optimizer = DPOptimizer(
                self._adam,
                noise_multiplier=self._workload.noise_multiplier,
                max_grad_norm=self._workload.clip_norm,
                expected_batch_size=self._workload.divisor(num_records),
                loss_reduction="mean",
            )
        return self._optimizer
