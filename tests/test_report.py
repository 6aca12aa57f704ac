"""Epsilons in words and figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.privacy.accounting import Guarantee
from fedray.privacy.levels import Unit
from fedray.rundir.cards import delta_warnings, format_epsilon, sentence


@given(st.floats(1e-6, 1e6))
def test_format_epsilon_never_understates(epsilon: float) -> None:
    shown = float(format_epsilon(epsilon))
    assert shown >= epsilon * (1 - 1e-12)
    assert shown <= epsilon * 1.002


@pytest.mark.parametrize(
    ("epsilon", "shown"), [(0.0, "0"), (1.31991, "1.320"), (17.91, "17.91"), (426.61, "426.7"), (12345.6, "12346")]
)
def test_format_epsilon_shows_four_digits(epsilon: float, shown: str) -> None:
    assert format_epsilon(epsilon) == shown


def _guarantee(
    epsilon: float, unit: str = "record", adjacency: str = "add-or-remove", mu: float | None = None
) -> Guarantee:
    return Guarantee(
        unit=unit,
        adjacency=adjacency,
        observer="everybody",
        epsilon=epsilon,
        delta=1e-5,
        mu=mu,
        mechanism="m",
        accountant="a",
    )


def test_sentence_names_unit_adjacency_delta_odds_and_observer() -> None:
    said = sentence(_guarantee(1.0))
    for words in ("epsilon 1.000 per record (add-or-remove, delta 1e-05)", "factor of 2.72", "Observer: everybody."):
        assert words in said


def test_sentence_calls_a_weak_promise_weak() -> None:
    assert "which is hardly a promise" in sentence(_guarantee(426.6, "gateway", "replace"))


def test_sentence_names_mu_where_there_is_one() -> None:
    assert "epsilon 14.08 per gateway (zero-out, delta 1e-05, mu 3.163)" in sentence(
        _guarantee(14.08, "gateway", "zero-out", 10**0.5)
    )
    assert "mu" not in sentence(_guarantee(1.0))


@pytest.mark.parametrize(
    ("units", "delta", "named"),
    [
        (["record"], 0.0099, []),
        (["record"], 0.01, ["one of a gateway's 100 records"]),
        (["gateway", "gateway"], 0.1, []),
        (["gateway", "gateway"], 0.125, ["one of all gateways"]),
        (["gateway", "record"], 0.2, ["one of all gateways", "one of a gateway's 100 records"]),
        ([], 0.9, []),
    ],
)
def test_delta_warnings_name_units_of_whom_delta_would_publish_one(
    units: list[Unit], delta: float, named: list[str]
) -> None:
    found = delta_warnings(units, delta, records=100, gateways=8)
    assert len(found) == len(named)
    assert all(words in sentence for words, sentence in zip(named, found, strict=True))
