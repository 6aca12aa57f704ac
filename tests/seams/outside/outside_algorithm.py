"""Gradients are pulled back to where the round began, as in FedProx (Li et al. 2020)."""

import torch

from fedray.algorithms.fedavg import FedAvg


class Pull(FedAvg):
    def __init__(self, strength: str = "0.1") -> None:
        self.strength = float(strength)

    def local_gradient(self, gradient: torch.Tensor, params: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        return gradient + self.strength * (params - sent)
