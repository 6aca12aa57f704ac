"""FedAvg (McMahan et al. 2017, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedray.algorithms.algorithm import Algorithm, Float32Array, Float64Array
from fedray.algorithms.server_optimizer import ServerOptimizer, State


class FedAvg(Algorithm):
    """Gateways train from what was sent and upload the difference; the server moves by its average.

    Uploads the update alone, which every level's epsilon covers.
    """

    uploads: Sequence[str] = ("update",)

    def local_gradient(self, gradient: torch.Tensor, params: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        """Return the gradients as they are."""
        return gradient

    local_gradient.changes_nothing = True  # type: ignore[attr-defined]  # trainers do not ask at each step

    def after_local(self, params: torch.Tensor, sent: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return params − sent."""
        return {"update": params.sub_(sent)}

    def server(
        self, params: Float32Array, means: Mapping[str, Float64Array], optimizer: ServerOptimizer, state: State
    ) -> tuple[Float32Array, State]:
        """Return what the server optimizer makes of the average update."""
        return optimizer.step(params, means["update"], state)
