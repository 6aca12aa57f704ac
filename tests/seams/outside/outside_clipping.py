"""Every vector comes near the length C (Bu et al. 2023)."""

import torch


class Automatic:
    def factor(self, norm: torch.Tensor, clip_norm: float) -> torch.Tensor:
        return clip_norm / (norm + 0.01)
