"""Norms and clipping on hard values; what clipping bounds in training is in test_sensitivity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedray.privacy.clipping import LARGEST_NORM, clip_rows, row_norms


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300, 1024, 70_001])
@pytest.mark.parametrize("scale", [1e-16, 1.0, 1e12])
def test_row_norms_are_those_of_float64(size: int, scale: float) -> None:
    rows = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(size)) * scale
    rows[1, 0] = 0.0
    expected = np.linalg.norm(rows.double().numpy(), axis=2)
    for given in (rows, rows.transpose(0, 1).contiguous().transpose(0, 1)):
        found = row_norms(given)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=0)


def test_row_norms_lose_no_digits_over_many_values() -> None:
    """One large value, then 3e7 small ones: added one after the other in float32, none of them would count."""
    rows = torch.full((1, 30_000_000), 1e-4)
    rows[0, 0] = 1.0
    assert row_norms(rows).item() == pytest.approx(math.sqrt(1.0 + (30_000_000 - 1) * 1e-8), rel=1e-6)


@pytest.mark.parametrize("size", [3, 128, 500])
def test_row_norms_that_are_unusable_stay_so(size: int) -> None:
    rows = torch.zeros(4, size)
    rows[0, -1], rows[1, 0], rows[2, size // 2], rows[3, 0] = torch.nan, -torch.inf, 3e38, 2e18
    assert not (row_norms(rows) <= LARGEST_NORM).any()
    assert not clip_rows(rows, 1.0).any()


def test_row_norms_of_no_values_are_zero() -> None:
    assert row_norms(torch.empty(2, 0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("clip_norm", [1e-15, 1e-6, 1.0, 1e15])
@pytest.mark.parametrize("size", [5, 700])
def test_clip_rows_bounds_every_row(clip_norm: float, size: int) -> None:
    random = torch.Generator().manual_seed(4)
    scales = torch.tensor([1e-22, 1e-18, 1e-15, 1e-14, 1e-6, 1.0, 1e6, 1e15]).unsqueeze(1)
    clipped = clip_rows(torch.randn(8, size, generator=random) * scales, clip_norm)
    assert np.linalg.norm(clipped.double().numpy(), axis=1).max() <= clip_norm * (1 + 1e-5)
