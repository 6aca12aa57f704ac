"""Keeps numbers as tensors: torch would convert a Python number at each use, which takes as long as the work."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=256)
def constant(value: float) -> torch.Tensor:
    """Return a number as a float32 tensor `[]`, for operations with tensors on any device; not to be changed."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device="cpu")
