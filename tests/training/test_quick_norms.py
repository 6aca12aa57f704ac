"""Norms of plain Linear layers in few calls, and where they are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedray.privacy.clipping import usable
from fedray.training.layers.layer import Slot
from fedray.training.layers.linear import StackedLinear, quick_norms


class Kept(StackedLinear):
    """A layer of 3 gateways that has seen inputs and output gradients of these sizes."""

    def __init__(self, a: torch.Tensor, e: torch.Tensor) -> None:
        slots = {"weight": Slot(where=slice(0, 6), shape=(2, 3)), "bias": Slot(where=slice(6, 8), shape=(2,))}
        super().__init__(slots, {})
        self.a, self.e = a, e


def _kept(scale_a: float, scale_e: float, seed: int) -> Kept:
    random = torch.Generator().manual_seed(seed)
    a, e = (torch.randn(3, 40, size, generator=random) for size in (300, 5))
    return Kept(a * scale_a, e * scale_e)


def _that_hold(layers: list[Kept], clip_norm: float) -> list[bool]:
    found = quick_norms(layers, torch.Size((3, 40)), clip_norm)
    return [False] * 3 if found is None else [True] * 3 if found[1] is None else found[1].tolist()


def _held(layers: list[Kept], clip_norm: float) -> torch.Tensor:
    found = quick_norms(layers, torch.Size((3, 40)), clip_norm)
    assert found is not None
    assert found[1] is None
    return found[0]


@pytest.mark.parametrize("scale_a", [0.0, 1e-12, 1.0, 1e6])
@pytest.mark.parametrize("scale_e", [0.0, 1e-30, 1e-12, 1.0, 1e6])
def test_quick_norms_are_those_of_float64(scale_a: float, scale_e: float) -> None:
    layers = [_kept(scale_a, scale_e, 1), _kept(1.0, 1e-3, 2)]
    found = _held(layers, 1.0)
    expected = torch.stack([layer.squared_norms() for layer in layers]).sum(0).sqrt()
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-6, atol=1e-7)


def test_quick_norms_are_usable_up_to_the_largest_inputs() -> None:
    """At 1e8·C, past which they are refused, as many layers as 1000 stay below the norm that counts as infinite."""
    value = torch.full((3, 40, 1), 9.99e7)
    found = _held([Kept(value, value)] * 1000, 1.0)
    assert bool(usable(found).all())
    assert _that_hold([Kept(value * 1.01, value)], 1.0) == [False] * 3


@pytest.mark.parametrize(
    ("scale_a", "scale_e", "clip_norm"),
    [
        (1.0, 1.0, 1e-9),
        (1e10, 1e-24, 1.0),
        (1e17, 1e-24, 1e-9),
        (1e2, 1e-20, 1e-15),
        (1.0, 1e12, 1.0),
        (1.0, float("nan"), 1.0),
    ],
)
def test_quick_norms_are_refused_where_float32_would_lose_what_counts(
    scale_a: float, scale_e: float, clip_norm: float
) -> None:
    layers = [_kept(1.0, 1.0, 1), _kept(scale_a, scale_e, 2)]
    assert _that_hold(layers, clip_norm) == [False] * 3


def test_quick_norms_are_refused_where_the_input_of_a_bias_is_large_beside_the_clip_norm() -> None:
    small = [_kept(1e-4, 1e-4, 1)]
    assert _that_hold(small, 1e-8) == [True] * 3
    assert _that_hold(small, 0.9e-8) == [False] * 3


@pytest.mark.parametrize("value", [3e18, 1e10, float("nan"), float("inf")])
def test_quick_norms_hold_for_gateways_whose_neighbour_has_a_record_of_any_size(value: float) -> None:
    layer = _kept(1.0, 1.0, 1)
    layer.a[1, 5] = value
    assert _that_hold([layer], 1.0) == [True, False, True]


def test_quick_norms_are_refused_for_rows_that_are_no_records() -> None:
    assert quick_norms([_kept(1.0, 1.0, 1)], torch.Size((3, 20)), 1.0) is None
