"""Local training of one gateway with Opacus as its documentation, and Flower's example with it, do it.

Everything is made anew for each gateway and round: optimizer, DataLoader, PrivacyEngine and what `make_private` wraps.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from opacus import PrivacyEngine
from plain_client import load
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from workload import Selection, Workload

warnings.filterwarnings("ignore", category=UserWarning)  # on secure_mode, and torch's on hooks


class DocumentedClient:
    """Trains a gateway with Opacus' own Poisson batches and noise; `model` is the last one trained."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._initial = workload.build_model()
        self.model = self._initial

    def train(
        self, received: Sequence[torch.Tensor], x: torch.Tensor, y: torch.Tensor, selections: Iterable[Selection]
    ) -> None:
        """Train from the received parameters for a round's steps; Opacus samples, so `selections` says how many only."""
        self.model = copy.deepcopy(self._initial)
        optimizer = self._workload.build_optimizer(self.model.parameters())
        load(list(self.model.parameters()), received, optimizer)
        private, private_optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
            module=self.model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(x, y), batch_size=self._workload.batch_size),
            noise_multiplier=self._workload.noise_multiplier,
            max_grad_norm=self._workload.clip_norm,
        )
        for _, (own_x, own_y) in zip(selections, _endless(loader), strict=False):
            private_optimizer.zero_grad()
            cross_entropy(private(own_x), own_y).backward()
            private_optimizer.step()


def _endless(loader: Iterable[list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    while True:
        yield from loader
