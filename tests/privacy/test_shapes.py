"""Whatever is plugged in, a clipped vector stays in its ball and noise is never less than what is charged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedray.errors import InputError
from fedray.privacy import accounting, mechanism
from fedray.privacy.accounting import Charges
from fedray.privacy.clipping import check_clipping, clip_factors, clip_rows
from fedray.privacy.noise import LocalNoise
from fedray.privacy.shapes import FixedClipping, IndependentNoise, NoiseShape, held_shape
from tests.privacy import checks
from tests.privacy.worlds import keys_of, spec_of


class _Rule:
    def __init__(self, factor: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
        self._factor = factor

    def factor(self, norm: torch.Tensor, clip_norm: float) -> torch.Tensor:
        return self._factor(norm, clip_norm)


RULES = {
    "too long": _Rule(lambda norm, clip_norm: 1e9 * clip_norm / norm),
    "one": _Rule(lambda norm, clip_norm: torch.ones_like(norm)),
    "infinite": _Rule(lambda norm, clip_norm: norm * math.inf),
    "no number": _Rule(lambda norm, clip_norm: norm * math.nan),
    "negative": _Rule(lambda norm, clip_norm: -clip_norm / norm),
    "in float64": _Rule(lambda norm, clip_norm: (2 * clip_norm / norm).double()),
    "automatic": _Rule(lambda norm, clip_norm: clip_norm / (norm + 0.01)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("clip_norm", [1e-15, 0.5, 1e15])
def test_clip_rows_stays_in_the_ball_by_any_rule(name: str, clip_norm: float) -> None:
    scales = torch.tensor([0.0, 1e-30, 1e-8, 0.1, 1.0, 1e5, 1e17, math.inf, math.nan])
    rows = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)) * scales.unsqueeze(1)
    clipped = clip_rows(rows, clip_norm, RULES[name])
    assert torch.isfinite(clipped).all()
    assert (clipped.double().norm(dim=1) <= clip_norm * (1 + 1e-5)).all()


def test_clip_factors_by_the_usual_rule_are_the_same_from_outside() -> None:
    norms = torch.tensor([0.0, 0.5, 1.0, 2.0, 1e18])
    outside = _Rule(FixedClipping().factor)
    assert torch.equal(clip_factors(norms, 1.0, rule=outside), clip_factors(norms, 1.0))


def test_clip_factors_show_a_rule_one_norm_at_a_time() -> None:
    """A rule that divides by the largest norm of a batch would let one record speak in another's factor."""
    by_largest = _Rule(lambda norm, clip_norm: clip_norm / norm.max())
    norms = torch.tensor([[2.0, 4.0], [8.0, 0.5]])
    factors = clip_factors(norms, 1.0, rule=by_largest)
    for row in range(2):
        for column in range(2):
            alone = clip_factors(norms[row, column].reshape(1), 1.0, rule=by_largest)
            assert torch.equal(factors[row, column], alone[0])
    assert not torch.allclose(factors, 1.0 / norms.max())


@pytest.mark.parametrize(
    "rule",
    [
        _Rule(lambda norm, clip_norm: torch.rand(()) * norm),
        _Rule(lambda norm, clip_norm: 1.0 if float(norm) < clip_norm else 0.5),  # type: ignore[arg-type,return-value]
        _Rule(lambda norm, clip_norm: norm.unknown),  # type: ignore[attr-defined]
    ],
)
def test_check_clipping_refuses_rules_that_draw_or_raise(rule: _Rule) -> None:
    with pytest.raises(InputError, match=r"--clip mine: factor\(norm, clip_norm\) raised"):
        check_clipping(rule, "mine")


class _Scaled:
    def __init__(self, least: float, scale: float) -> None:
        self.least, self._scale = least, scale

    def scale(self, round_index: int, step: int) -> float:
        return self._scale


@pytest.mark.parametrize(
    ("least", "scale", "truth"), [(1.0, 2.0, 2.0), (1.0, 0.1, 1.0), (0.5, math.nan, 0.5), (2.0, -3.0, 2.0)]
)
def test_noise_is_never_less_than_is_charged(least: float, scale: float, truth: float) -> None:
    shape: NoiseShape = _Scaled(least, scale)
    spec = spec_of("sample", noise_shape=shape)
    out = np.empty((1, 40_000), np.float32)
    LocalNoise(spec, keys_of(1), [0]).fill(0, out)
    checks.check_noise_law(out, truth * spec.noise_std)
    central = spec_of("gateway", noise_shape=shape)
    released = mechanism.aggregate(central, keys_of(1), np.zeros(40_000), 4.0, ((0, 3),)) * central.expected_cohort
    checks.check_noise_law(released, truth * central.noise_std)


@pytest.mark.parametrize("level", ["sample", "batch", "gateway"])
def test_epsilon_follows_from_the_least_noise(level: str) -> None:
    charges = Charges(steps=30, rounds=10)
    spec = spec_of(level, noise_shape=IndependentNoise(least=2.0))
    doubled = replace(spec_of(level), noise_multiplier=2 * spec.noise_multiplier)
    assert [g.epsilon for g in accounting.guarantees(spec, charges)] == [
        g.epsilon for g in accounting.guarantees(doubled, charges)
    ]


@pytest.mark.parametrize("least", [0.0, -1.0, math.nan, math.inf, True, "1"])
def test_held_shape_refuses_a_least_scale_that_is_none(least: object) -> None:
    with pytest.raises(InputError, match="--noise-shape mine: least is"):
        held_shape(_Scaled(least, 1.0), "mine")  # type: ignore[arg-type]  # that is the point


def test_held_shape_charges_what_is_added_even_by_a_shape_that_changes() -> None:
    class Shrinks:
        asked = 0

        @property
        def least(self) -> float:
            self.asked += 1
            return 1.0 / self.asked

        def scale(self, round_index: int, step: int) -> float:
            return 0.0

    spec = spec_of("sample", noise_shape=held_shape(Shrinks(), "mine"))
    out = np.empty((1, 40_000), np.float32)
    LocalNoise(spec, keys_of(1), [0]).fill(0, out)
    checks.check_noise_law(out, spec.charged_multiplier * spec.clip_norm)
